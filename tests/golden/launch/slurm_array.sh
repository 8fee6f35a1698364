# start
set -e
data=$(sbatch --parsable --job-name=quick --time=2:00:00 --cpus-per-task=1 --output=quick-%j.log --partition=cpu <<'END'
#!/bin/bash -e
jaxlm sweep --config=experiments/quickstart.py --workdir=/shared/quickstart --dry-run
END
)
members=$(sbatch --parsable --job-name=quick --time=2:00:00 --cpus-per-task=1 --output=quick-%j.log --partition=cpu --array=0-7 "--dependency=afterok:${data}" --requeue <<'END'
#!/bin/bash -e
jaxlm sweep --config=experiments/quickstart.py --workdir=/shared/quickstart --index=$SLURM_ARRAY_TASK_ID/8
END
)
sbatch --parsable --job-name=quick --time=2:00:00 --cpus-per-task=1 --output=quick-%j.log --partition=cpu "--dependency=afterok:${members}" <<'END'
#!/bin/bash -e
jaxlm sweep --config=experiments/quickstart.py --workdir=/shared/quickstart
END


# logs
set -e
sh -c 'tail -n 100 -F quick-*.log'

# status
set -e
squeue --name=quick

# stop
set -e
scancel --name=quick
