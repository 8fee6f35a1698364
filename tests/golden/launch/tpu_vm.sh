# start
set -e
gcloud compute tpus queued-resources create gpt3 --node-id=gpt3 --type=v5p --topology=8x8x16 --runtime-version=v2-alpha-tpuv5 --spot --project=p --zone=us-east5-b
until state=$(gcloud compute tpus queued-resources describe gpt3 '--format=value(state.state)' --project=p --zone=us-east5-b); [ "$state" = ACTIVE ]; do [ "$state" != FAILED ]; sleep 30; done
gcloud compute tpus tpu-vm scp --recurse . 'gpt3:~/gpt3' --worker=all --project=p --zone=us-east5-b
gcloud compute tpus tpu-vm ssh gpt3 --worker=all '--command=pip install '"'"'jaxlm[tpu]'"'"' && df -h' --project=p --zone=us-east5-b
gcloud compute tpus tpu-vm ssh gpt3 --worker=all '--command=cd ~/gpt3 || exit; nohup jaxlm supervise -- train --config=experiments/gpt3_175b.py '"'"'--workdir=/mnt/it'"'"'"'"'"'"'"'"'s here'"'"' --distributed > ~/gpt3.log 2>&1 < /dev/null & echo $! > ~/gpt3.pid' --project=p --zone=us-east5-b

# logs
set -e
gcloud compute tpus tpu-vm ssh gpt3 --worker=0 '--command=tail -n 100 -F ~/gpt3.log' --project=p --zone=us-east5-b

# status
set -e
gcloud compute tpus queued-resources describe gpt3 --project=p --zone=us-east5-b

# stop
set -e
gcloud compute tpus tpu-vm ssh gpt3 --worker=all '--command=kill $(cat ~/gpt3.pid) && sleep 15 || true' --project=p --zone=us-east5-b
gcloud compute tpus queued-resources delete gpt3 --force --quiet --project=p --zone=us-east5-b
