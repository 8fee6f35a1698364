# start
set -e
ray job submit --address=http://head:8265 --submission-id=quick --working-dir=. --no-wait -- bash -c 'jaxlm sweep --config=experiments/quickstart.py --workdir=/shared/quickstart --config.engine=ray'

# logs
set -e
ray job logs --address=http://head:8265 --follow quick

# status
set -e
ray job status --address=http://head:8265 quick

# stop
set -e
ray job stop --address=http://head:8265 quick
