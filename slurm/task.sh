# Sourced by batch scripts: executes one array task in srun steps, and requeues it.
#
#   run_step SRUN-ARGUMENTS COMMAND...   runs the command on every rank of the task. Returns its
#                                        exit status; does not return when the task is requeued.
#   find_python                          sets `python`, for templates: PYTHON, else that of the
#                                        activated environment, else of .venv in the clone
#   run_points FOLDER LIST COMMAND...    run_step for each run that line TASK-INDEX + 1 of the file
#                                        LIST names, in turn, printing to FOLDER/jobs/RUN_ID.log;
#                                        BIP_RUNS_AT_ONCE at once, by launch/slurm/together.py
#
# A run that was stopped by a signal saves and exits with 75 (or the signal kills it before its
# handler is installed). Then this script requeues the task, because on some SLURM versions a task
# that exits within the grace period of a preemption counts as failed. It also requeues a task whose
# node failed, of which no rank started, whose ranks did not meet, or whose file system was
# unreachable. Any other failure is final. launch/slurm/events.py has the rules;
# launch/slurm/batch.py applies them here, with python3 of the batch node.
#
# A final failure is recorded in FOLDER/jobs/RUN_ID.failed, and no later attempt tries again. In any
# case a task is requeued from here BIP_MAX_RESTARTS times at most. The default is 100; in a sweep,
# 1000 more than the profile's retries; 10 where Python does not start.

# The user's shell lines before this may have set options that break these functions.
set +efu +o pipefail
shopt -u nullglob failglob
# These signals are for the ranks; bash must survive them to requeue the task.
trap '' TERM USR1 USR2
bip_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bip_root=${bip_root%/bip/_files} # where a wheel has this file
bip_run=() # of a sweep: FOLDER RUN_ID LOG-SIZE SRUN-LOG-SIZE

decider() { # of this clone or snapshot, not of an installed package
  python3 -I -S "$bip_root/launch/slurm/batch.py" "$@"
}

find_python() {
  local tried=(python3 "$bip_root/.venv/bin/python" "$bip_root/venv/bin/python")
  local test='import importlib.util as u, sys
sys.exit(sys.version_info < (3, 11) or u.find_spec("torch") is None)'
  [[ ! ${PYTHON-} ]] || tried=("$PYTHON")
  for python in "${tried[@]}"; do
    ! "$python" -c "$test" 2>/dev/null || return 0
  done
  echo "error: PYTHON: ${tried[*]}: none is a Python 3.11 with torch; activate the project's" \
    "environment, or PYTHON=/path/to/python sbatch ..." >&2
  return 2
}

run_step() {
  local code=0 began=$SECONDS verdict
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" || code=$?
  ((code)) || return 0
  verdict=$(decider end "$code" "$((SECONDS - began))" "${bip_run[@]}") || verdict=
  case $verdict in
    requeued) exit 75 ;;
    final) return "$code" ;;
    *) without_python "$code" "${bip_run[@]}" ;;
  esac
}

run_points() {
  local folder=$1 list=$2 run failed=0 bip_run attempt size srun_size runs
  shift 2
  runs=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list")
  if ((${BIP_RUNS_AT_ONCE:-1} > 1)); then
    # Without python3 on the batch node this fails, and its message is in the task's log.
    # shellcheck disable=SC2086
    python3 -I -S "$bip_root/launch/slurm/together.py" "$folder" "$BIP_RUNS_AT_ONCE" $runs -- "$@"
    return
  fi
  for run in $runs; do
    # It failed in an earlier attempt of this task.
    [[ ! -e $folder/jobs/$run.failed ]] || { failed=1; continue; }
    read -r attempt size srun_size < <(decider begin "$folder" "$run")
    bip_run=("$folder" "$run" "${size:-0}" "${srun_size:-0}")
    BIP_POINT=$run BIP_ATTEMPT=${attempt:-$(task_name).${SLURM_RESTART_COUNT:-0}} \
      run_step --output="$folder/jobs/$run.log" --open-mode=append "$@" || failed=1
  done
  return "$failed"
}

# The rest is for a batch node on which python3 does not start, or fails.

task_name() { # never the bare ID of an array: scontrol takes that for all its tasks
  if [[ ${SLURM_ARRAY_JOB_ID-} ]]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else echo "$SLURM_JOB_ID"; fi
}

without_python() { # CODE [FOLDER RUN_ID SIZES]: a bounded requeue of what may pass
  local code=$1 jobs=${2:+$2/jobs/$3} restarts=${SLURM_RESTART_COUNT:-0} reason
  local most=${BIP_MAX_RESTARTS:-10}
  [[ ! $jobs || ! -e $jobs.failed ]] || return "$code"
  reason="exit code $code of srun, and python3 does not start, or fails, on $(hostname)"
  if [[ $code =~ ^(74|75|135|138|140|143)$ || ($jobs && -e $jobs.lost) ]]; then
    if ((restarts < most)); then
      echo "$reason: requeued without its rules ($restarts restarts so far, $most at most)" >&2
      # In any other state it is requeued already, or cancelled.
      [[ $(scontrol show job -o "$(task_name)") == *JobState=RUNNING* ]] || exit 75
      scontrol requeue "$(task_name)" && { sleep 60; exit 75; }
    fi
    reason+="; already restarted $restarts times, or SLURM refuses to requeue"
  fi
  echo "$reason" >&2
  # An empty record, as of a full disk, would hide the reason.
  [[ ! $jobs ]] || echo "{\"reason\": \"$reason\"}" >"$jobs.failed" || rm -f "$jobs.failed"
  return "$code"
}
