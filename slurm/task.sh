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

is_over() { # whether SLURM has ended this task for good; $1 is what `scontrol show job -o` says
  # Until its processes are gone, a cancelled task is shown as COMPLETING, like one that SLURM has
  # requeued (Restarts tells it, also after a node failure) and one that reached its limit.
  [[ $1 == *" Restarts=${SLURM_RESTART_COUNT:-0} "* && $1 =~ \ EndTime=[0-9] &&
    $1 =~ JobState=(CANCELLED|PREEMPTED|COMPLETING) && $1 != *Reason=TimeLimit* ]]
}

how_to_go_on() {
  if [[ ${folder-} ]]; then echo "python -m launch resume $folder goes on"; else
    echo "the same sbatch line goes on"; fi
}

requeue() { # returns, with $reason, only if SLURM will not run this task again
  local known answer deadline=$((SECONDS + ${BIP_REQUEUE_SECONDS:-600}))
  while :; do
    if answer=$(scontrol show job -o "$(task_name)" 2>&1); then
      known=$answer
      # Where SLURM has requeued it already, a second time would hit the next attempt.
      [[ $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* && $known != *JobState=PENDING* ]] ||
        break
      if is_over "$known"; then
        reason="cancelled; $(how_to_go_on)"
        return
      fi
      answer=$(scontrol requeue "$(task_name)" 2>&1) && break
    fi
    case ${answer,,} in
      *pending*) break ;;
      *disabled* | *denied* | *invalid* | *"not found"*) deadline=0 ;; # asking again will not help
    esac
    if ((SECONDS >= deadline)); then
      reason="saved at its last step, but SLURM refuses to requeue (${answer%%$'\n'*}); "
      reason+=$(how_to_go_on)
      echo "$reason" >&2
      return
    fi
    echo "no answer of scontrol ($answer); asking again" >&2
    sleep "${BIP_REQUEUE_PAUSE:-10}"
  done
  sleep 900 # until SLURM ends this
}

nodes_answer() { # whether a step still starts on every node of the task
  local probe=(timeout 60 srun --overlap --ntasks-per-node=1)
  probe+=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" true)
  "${probe[@]}" || { sleep 20; "${probe[@]}"; }
}

run_step() {
  local code=0
  reason=
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" || code=$?
  ((code)) || return 0
  # A note is final, also beside a rank that was just stopped: cancelled, or the budget is spent.
  case $code in
    75 | 138 | 140 | 143) # EX_TEMPFAIL; 128 + USR1, USR2, TERM
      [[ -e ${note-} ]] || requeue
      return "$code"
      ;;
  esac
  # What the ranks say of a spent budget is final, or a cluster where no step starts would loop.
  if ((${SLURM_NNODES:-1} > 1)) && ! grep -qs retries.lost "${note-}" && ! nodes_answer; then
    # A node failed: the ranks notice it minutes before SLURM does, which then requeues the task.
    if [[ -e ${note-} ]]; then # set aside: counted with the attempts that were lost
      { tr -d '\n' <"$note" && echo; } >>"$note.before"
      rm "$note"
    fi
    sleep 600
    requeue
  fi
  return "$code"
}

run_points() {
  local folder=$1 list=$2 point failed=0 code note err
  shift 2
  for point in $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list"); do
    note=$folder/jobs/$point.failed
    [[ ! -e $note ]] || { failed=1; continue; } # before a requeue, in this submission
    code=0
    BIP_POINT=$point run_step --output="$folder/jobs/$point.log" --open-mode=append "$@" || code=$?
    ((code)) || continue
    failed=1
    [[ ! -e $note ]] || continue # a rank that could still speak has written why
    if [[ -z $reason ]] && is_over "$(scontrol show job -o "$(task_name)")"; then
      reason="cancelled; $(how_to_go_on)"
    fi
    err=slurm/${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_0_log.err
    reason=${reason:-exit code $code of srun; see $point.log, and $err in $folder/jobs}
    echo "{\"reason\": \"${reason//[\"\\]/}\"}" >"$note.new"
    mv "$note.new" "$note"
  done
  return "$failed"
}
