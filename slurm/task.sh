# Sourced by batch scripts: one array task, its srun steps, and its requeueing.
#
#   run_step SRUN-ARGUMENTS COMMAND...   runs the command on every rank of the task. Returns its
#                                        exit status; does not return when the task is requeued.
#   run_points FOLDER LIST COMMAND...    run_step for each run that line TASK-INDEX + 1 of the file
#                                        LIST names, in turn, printing to FOLDER/jobs/RUN_ID.log
#
# A run that was stopped by a signal exits with 75 after its save (or dies of the signal before it
# could take notice), and the task is requeued: from here, because on some SLURM versions a task
# that exits within the grace period of a preemption is taken as failed. Any other status is final.

# bash would otherwise die of what is meant for the ranks, and with it the requeueing.
trap '' TERM USR1 USR2

task_name() { # never the bare ID of an array: scontrol takes that for all its tasks
  echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}" |
    grep . || echo "$SLURM_JOB_ID"
}

requeue() {
  local known
  known=$(scontrol show job -o "$(task_name)") || return 0
  # Where SLURM has requeued it already, a second time would hit the next attempt.
  if [[ $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* && $known != *JobState=PENDING* ]]; then
    scontrol requeue "$(task_name)" || return 0
  fi
  sleep 900 # until SLURM ends this
}

nodes_answer() { # whether a step still starts on every node of the task
  timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true
}

run_step() {
  local code=0
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" || code=$?
  case $code in
    0) return ;;
    75 | 138 | 140 | 143) requeue ;; # EX_TEMPFAIL; 128 + USR1, USR2, TERM
  esac
  if ((${SLURM_NNODES:-1} > 1)) && ! nodes_answer; then
    # A node failed: the ranks notice it minutes before SLURM does, which then requeues the task.
    [[ -z ${note-} ]] || rm -f "$note"
    sleep 600
    requeue
  fi
  return "$code"
}

run_points() {
  local folder=$1 list=$2 point failed=0 code note
  shift 2
  for point in $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list"); do
    note=$folder/jobs/$point.failed
    [[ ! -e $note ]] || { failed=1; continue; } # before a requeue, in this submission
    code=0
    BIP_POINT=$point run_step --output="$folder/jobs/$point.log" --open-mode=append "$@" || code=$?
    ((code)) || continue
    failed=1
    # A rank that could still speak has written why.
    [[ -e $note ]] || echo "{\"reason\": \"exit code $code of srun; see $point.log\"}" >"$note"
  done
  return "$failed"
}
