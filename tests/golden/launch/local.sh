# start
set -e
bash -c 'export A=1 && exec jaxlm sweep --config=experiments/quickstart.py --workdir=/shared/quickstart'
