# start
set -e
sbatch --parsable --job-name=gpt3 --time=24:00:00 --cpus-per-task=1 --output=gpt3-%j.log --gpus-per-node=8 --nodes=4 --ntasks-per-node=1 --requeue <<'END'
#!/bin/bash -e
module load cuda
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7
srun --kill-on-bad-exit=1 jaxlm train --config=experiments/gpt3_175b.py '--workdir=/mnt/it'"'"'s here' --distributed
END


# logs
set -e
sh -c 'tail -n 100 -F gpt3-*.log'

# status
set -e
squeue --name=gpt3

# stop
set -e
scancel --name=gpt3
