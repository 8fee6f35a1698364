# start
set -e
kubectl apply -f - <<'END'
{
 "apiVersion": "jobset.x-k8s.io/v1alpha2",
 "kind": "JobSet",
 "metadata": {
  "name": "small",
  "namespace": "default",
  "annotations": {
   "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
  }
 },
 "spec": {
  "failurePolicy": {
   "maxRestarts": 100,
   "rules": [
    {
     "action": "FailJobSet",
     "onJobFailureReasons": [
      "PodFailurePolicy"
     ]
    }
   ]
  },
  "replicatedJobs": [
   {
    "name": "slice",
    "replicas": 1,
    "template": {
     "spec": {
      "parallelism": 1,
      "completions": 1,
      "backoffLimit": 0,
      "podFailurePolicy": {
       "rules": [
        {
         "action": "FailJob",
         "onExitCodes": {
          "containerName": "jaxlm",
          "operator": "In",
          "values": [
           1,
           2
          ]
         }
        }
       ]
      },
      "template": {
       "spec": {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        "nodeSelector": {
         "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
         "cloud.google.com/gke-tpu-topology": "2x2"
        },
        "containers": [
         {
          "name": "jaxlm",
          "image": "registry/jaxlm:1",
          "command": [
           "bash",
           "-c",
           "exec jaxlm train --config=experiments/gpt3_175b.py '--workdir=/mnt/it'\"'\"'s here'"
          ],
          "resources": {
           "limits": {
            "google.com/tpu": 4
           }
          }
         }
        ]
       }
      }
     }
    }
   }
  ]
 }
}
END


# logs
set -e
kubectl --namespace=default logs --follow --tail=100 -l jobset.sigs.k8s.io/jobset-name=small,batch.kubernetes.io/job-completion-index=0

# status
set -e
kubectl --namespace=default get jobset small

# stop
set -e
kubectl --namespace=default delete jobset small
