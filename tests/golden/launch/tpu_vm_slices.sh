# start
set -e
gcloud compute tpus queued-resources create small --node-count=2 --node-prefix=small --type=v5litepod --topology=16x16 --runtime-version=v2-alpha-tpuv5-lite --project=p --zone=us-west4-a
until state=$(gcloud compute tpus queued-resources describe small '--format=value(state.state)' --project=p --zone=us-west4-a); [ "$state" = ACTIVE ]; do [ "$state" != FAILED ]; sleep 30; done
gcloud compute tpus tpu-vm ssh small-0 --worker=all '--command=nohup jaxlm supervise -- train --config=experiments/gpt3_175b.py '"'"'--workdir=/mnt/it'"'"'"'"'"'"'"'"'s here'"'"' --distributed > ~/small.log 2>&1 < /dev/null & echo $! > ~/small.pid' --project=p --zone=us-west4-a
gcloud compute tpus tpu-vm ssh small-1 --worker=all '--command=nohup jaxlm supervise -- train --config=experiments/gpt3_175b.py '"'"'--workdir=/mnt/it'"'"'"'"'"'"'"'"'s here'"'"' --distributed > ~/small.log 2>&1 < /dev/null & echo $! > ~/small.pid' --project=p --zone=us-west4-a

# logs
set -e
gcloud compute tpus tpu-vm ssh small-0 --worker=0 '--command=tail -n 100 -F ~/small.log' --project=p --zone=us-west4-a

# status
set -e
gcloud compute tpus queued-resources describe small --project=p --zone=us-west4-a

# stop
set -e
gcloud compute tpus tpu-vm ssh small-0 --worker=all '--command=kill $(cat ~/small.pid) && sleep 15 || true' --project=p --zone=us-west4-a
gcloud compute tpus tpu-vm ssh small-1 --worker=all '--command=kill $(cat ~/small.pid) && sleep 15 || true' --project=p --zone=us-west4-a
gcloud compute tpus queued-resources delete small --force --quiet --project=p --zone=us-west4-a
