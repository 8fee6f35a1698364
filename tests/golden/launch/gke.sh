# start
set -e
kubectl apply -f - <<'END'
{
 "apiVersion": "jobset.x-k8s.io/v1alpha2",
 "kind": "JobSet",
 "metadata": {
  "name": "gpt3",
  "namespace": "default",
  "labels": {
   "kueue.x-k8s.io/queue-name": "tpus"
  },
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
    "replicas": 4,
    "template": {
     "spec": {
      "parallelism": 64,
      "completions": 64,
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
         "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
         "cloud.google.com/gke-tpu-topology": "16x16"
        },
        "containers": [
         {
          "name": "jaxlm",
          "image": "registry/jaxlm:1",
          "command": [
           "bash",
           "-c",
           "ulimit -n 65536 && exec jaxlm train --config=experiments/gpt3_175b.py '--workdir=/mnt/it'\"'\"'s here' --distributed"
          ],
          "resources": {
           "limits": {
            "google.com/tpu": 4
           }
          }
         }
        ],
        "serviceAccountName": "writer"
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
kubectl --namespace=default logs --follow --tail=100 -l jobset.sigs.k8s.io/jobset-name=gpt3,batch.kubernetes.io/job-completion-index=0

# status
set -e
kubectl --namespace=default get jobset gpt3

# stop
set -e
kubectl --namespace=default delete jobset gpt3
