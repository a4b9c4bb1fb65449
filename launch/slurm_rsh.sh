#!/usr/bin/env bash
# The remote shell of a Slurm job (launch/slurm.sbatch): AGENT HOST COMMAND, inside the job's allocation; needs no ssh.
set -euo pipefail
host="$1"
shift
# The step of a daemon is beside others and has the node's whole share of the job, as the ranks that it starts need it. By
# variables: older Slurms do so anyway and know no such options.
export SLURM_OVERLAP=1 SLURM_WHOLE=1
exec srun --nodes=1 --ntasks=1 --nodelist="$host" --mpi=none --cpu-bind=none --input=none bash -c "$*"
