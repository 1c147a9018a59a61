# Sourced by batch scripts: one array task, its srun steps, and its requeueing.
#
#   run_step SRUN-ARGUMENTS COMMAND...   runs the command on every rank of the task. Returns its
#                                        exit status; does not return when the task is requeued.
#   run_points FOLDER LIST COMMAND...    run_step for each run that line TASK-INDEX + 1 of the file
#                                        LIST names, in turn, printing to FOLDER/jobs/RUN_ID.log
#
# A run that was stopped by a signal exits with 75 after its save (or dies of the signal before it
# could take notice), and the task is requeued: from here, because on some SLURM versions a task
# that exits within the grace period of a preemption is taken as failed. So is a task whose node
# failed, and one of which no rank began or the ranks did not meet, or died of a file system that was
# away (SIGBUS is what a mapped file has for an I/O error). Any other status is final.
#
# What is final stands in FOLDER/jobs/RUN_ID.failed, and no later attempt tries again. What a rank
# says that lost the others stands in RUN_ID.lost: it cannot know why, so this shell decides, which
# may be killed with its node. The ranks of a sweep keep the budgets of its profile. Whatever they
# say, a task is requeued from here BIP_MAX_RESTARTS times at most: 100; of a sweep, 1000 more than
# its budgets.

# The user's shell lines before this one may have set what these functions do not bear.
set +efu +o pipefail
shopt -u nullglob failglob
# bash would otherwise die of what is meant for the ranks, and with it the requeueing.
trap '' TERM USR1 USR2
unset folder point note lost # of the user's environment; set, they mean a point of a sweep

task_name() { # never the bare ID of an array: scontrol takes that for all its tasks
  echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}" |
    grep . || echo "$SLURM_JOB_ID"
}

look() { # sets $standing to what SLURM has made of this task: runs, requeued, cancelled.
  # Empty, with $answer, where it says nothing for ten minutes.
  local deadline=$((SECONDS + ${BIP_REQUEUE_SECONDS:-600}))
  standing=
  until answer=$(scontrol show job -o "$(task_name)" 2>&1); do
    ! will_not_change && ((SECONDS < deadline)) || return 0
    ask_again
  done
  # Until its processes are gone, a cancelled task is shown as COMPLETING, like one that SLURM has
  # requeued (Restarts tells it, also after a node failure) and one that reached its limit.
  standing=runs
  if [[ $answer != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] ||
    [[ $answer =~ JobState=(PENDING|REQUEUE) ]]; then
    standing=requeued
  elif [[ $answer =~ JobState=(CANCELLED|PREEMPTED|COMPLETING) && $answer != *Reason=TimeLimit* ]]
  then
    [[ $answer =~ \ EndTime=[0-9] ]] && standing=cancelled || standing=requeued
  fi
}

will_not_change() { # whether $answer is an error that asking again does not mend
  [[ ${answer,,} =~ disabled|denied|invalid|not\ found ]]
}

ask_again() {
  echo "no answer of scontrol ($answer); asking again" >&2
  sleep "${BIP_REQUEUE_PAUSE:-10}"
}

how_to_go_on() {
  if [[ ${folder-} ]]; then echo "python -m launch resume $folder goes on"; else
    echo "the same sbatch line goes on"; fi
}

await_end() { # by SLURM, which has requeued this task
  # While it clears the task away an exit is no news to it, and frees the nodes before KillWait is
  # over. Once the next attempt runs, it would take the exit for the end of that.
  local round
  for round in {1..15}; do
    BIP_REQUEUE_SECONDS=0 look
    [[ ! $answer =~ JobState=(COMPLETING|PENDING|REQUEUE) ]] || break
    sleep 60
  done
  exit 75
}

is_cancelled() { # by SLURM; sets $reason. Does not return where SLURM has requeued this task
  look
  [[ $standing != requeued ]] || await_end
  [[ $standing == cancelled ]] || return 1
  reason="cancelled; $(how_to_go_on)"
}

requeue() { # returns, with $reason, only if SLURM will not run this task again
  local deadline=$((SECONDS + ${BIP_REQUEUE_SECONDS:-600}))
  while :; do
    # Looked at each time: a second requeue would hit the next attempt.
    ! is_cancelled || return 0
    if [[ $standing ]]; then
      ! is_spent || break
      ! answer=$(scontrol requeue "$(task_name)" 2>&1) || await_end
      [[ ${answer,,} != *pending* ]] || await_end
    fi
    if will_not_change || ((SECONDS >= deadline)); then
      ((code != 75)) || reason="${unmet:-saved at its last step}, but "
      reason+="SLURM refuses to requeue (${answer%%$'\n'*}); $(how_to_go_on)"
      break
    fi
    ask_again
  done
  echo "$reason" >&2
}

of_profile() { # the number that the array's profile gives for $1; $2 without one
  local number
  number=$(sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p" "${BIP_PROFILE-}" 2>/dev/null || true)
  echo "${number:-$2}"
}

is_preempted() { # says $answer
  [[ $answer =~ \ PreemptTime=[0-9] ]]
}

is_near_limit() { # says $answer; SLURM signals up to a minute early
  local end
  [[ $answer =~ \ EndTime=([0-9][^ ]*) ]] && end=$(date -d "${BASH_REMATCH[1]}" +%s) &&
    ((end - $(date +%s) < $(of_profile signal_lead 120) + 120))
}

is_spent() { # whether this task has been requeued often enough; sets $reason
  local restarts=${SLURM_RESTART_COUNT:-0} most=100 name allowed back
  [[ ! ${folder-} ]] || most=$((1000 + $(of_profile preempted 100) + $(of_profile timed_out 100)))
  most=${BIP_MAX_RESTARTS:-$most}
  if ((restarts >= most)); then
    reason="exit code $code of srun, and already restarted $restarts times (BIP_MAX_RESTARTS is"
    reason+=" $most); $(how_to_go_on)"
    return 0
  fi
  if [[ ! ${folder-} && $code =~ ^(74|135)$ ]] &&
    ((restarts >= 5 && SECONDS - began < 600)); then
    reason="a file system fails, or is away (exit code $code of srun), within ten minutes, and"
    reason+=" already restarted $restarts times; $(how_to_go_on)"
    return 0
  fi
  # The ranks count what they can. Attempts in a row without progress count here that did not come so
  # far, or failed without SLURM's doing.
  [[ $unmet ]] && ! is_preempted && ! has_saved || return 1
  name=$(task_name)
  grep -qsF "\"$name.$restarts\"" "$note.before" ||
    echo "{\"reason\": \"exit code $code of srun, $unmet\"," \
      "\"attempt\": \"$name.$restarts\"}" >>"$note.before"
  allowed=$(of_profile lost 5)
  for ((back = 0; back <= allowed; back++)); do
    grep -qsF "\"$name.$((restarts - back))\"" "$note.before" || return 1
  done
  reason="$unmet in $back attempts in a row (exit code $code of srun); the profile's"
  reason+=" retries.lost is $allowed; $(logs)"
}

attempt_name() {
  echo "$(task_name).${SLURM_RESTART_COUNT:-0}"
}

has_begun() { # whether python has come to a rank's first line in this attempt
  grep -qsxF "$(attempt_name)" "$folder/jobs/$point.begun"
}

has_saved() { # whether this attempt has added a checkpoint
  local manifest
  has_begun || return 1
  for manifest in "$folder"/*/"$point"/checkpoint/manifest.json; do
    [[ ! $manifest -nt $folder/jobs/$point.begun ]] || return 0
  done
  return 1
}

find_unmet() { # sets $unmet to why another attempt may succeed, or to nothing
  unmet=
  [[ ${folder-} ]] || return 0
  case $code in
    2 | 13 | 126 | 127) return 0 ;; # the command is missing, or may not be executed
  esac
  if [[ -e $lost ]]; then
    ! grep -q 'error: ranks: .* in time' "$lost" || unmet="the ranks did not meet"
  elif ! has_begun; then # srun could not start it: the controller or a node was away
    unmet="no rank began"
  fi
  # srun's code is the highest: 137 where another rank had to be killed.
  [[ $unmet ]] || { ((code != 135)) && ! printed | grep -aq '^Fatal Python error: Bus error'; } ||
    unmet="a rank died of SIGBUS: the file system of its data fails or was away"
}

find_loss() { # find_unmet after a signal: that counts only where it was not SLURM's
  if [[ -e ${lost-} ]]; then
    unmet="the ranks failed ($(what_they_lost))"
    set_aside_lost
  elif ((code != 75)); then find_unmet; fi
  [[ $unmet ]] || return 0
  sleep 5 # its record of a preemption may come late
  look
  [[ $standing == runs ]] && ! is_preempted && ! is_near_limit || unmet=
}

what_they_lost() { # in a rank's words
  sed -n 's/.*"reason": *"\(.*\)".*/\1/p' "$lost" | tr -d '"\\' | cut -c1-500
}

set_aside_lost() { # what ranks said of an attempt that was not final
  [[ -e ${lost-} ]] || return 0
  { tr -d '\n' <"$lost" && echo; } >>"$note.before"
  rm "$lost"
}

nodes_answer() { # whether a step still starts on every node of the task
  local probe=(timeout 60 srun --overlap --ntasks-per-node=1)
  probe+=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" true)
  "${probe[@]}" || { sleep 20; "${probe[@]}"; }
}

run_step() {
  local code=0 unmet= began=$SECONDS
  reason=
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" || code=$?
  ((code)) || return 0
  # A note is final, also beside a rank that was just stopped: cancelled, or the budget is spent.
  [[ ! -e ${note-} ]] || return "$code"
  case $code in
    75 | 138 | 140 | 143) # EX_TEMPFAIL; 128 + USR1, USR2, TERM
      # Where one rank could not start, or failed, srun ends the others by TERM.
      find_loss
      requeue
      return "$code"
      ;;
    74 | 135) # EX_IOERR of bip; SIGBUS
      if [[ ! ${folder-} ]]; then
        requeue
        return "$code"
      fi
      ;;
  esac
  [[ ! -e ${lost-} ]] || sleep 5 # SLURM's record of a preemption may come late
  # SLURM ends the ranks of a task that it has requeued before it ends this shell.
  ! is_cancelled || return "$code"
  find_unmet
  if [[ ${folder-} && ! $unmet ]] && has_begun && { is_preempted || is_near_limit; }; then
    # What it runs may die of the signal (a compiler's processes, say), and the ranks of that.
    unmet="the ranks failed while SLURM was ending them"
    set_aside_lost
    requeue
    return "$code"
  fi
  if ((${SLURM_NNODES:-1} > 1)); then
    if ! nodes_answer; then
      # A node failed: the ranks notice it minutes before SLURM does, which then requeues the task.
      set_aside_lost
      sleep 600
      requeue
      return "$code"
    fi
    ! is_cancelled || return "$code" # SLURM has noticed meanwhile
  fi
  if [[ $unmet ]]; then
    set_aside_lost
    requeue
  fi
  return "$code"
}

printed() { # by the ranks of this attempt
  tail -c "+$((log_size + 1))" "$folder/jobs/$point.log" 2>/dev/null
}

last_error() { # of this attempt, by a rank that died before it could leave a note
  printed | LC_ALL=C grep -a '^error: ' | tail -n 1 | cut -c1-500 | LC_ALL=C sed 's/[^ -~]/?/g; s/$/; /'
}

logs() {
  echo "see $point.log, and slurm/$(task_name)_0_log.err in $folder/jobs"
}

run_points() {
  local folder=$1 list=$2 point failed=0 code note lost log_size
  shift 2
  for point in $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list"); do
    note=$folder/jobs/$point.failed lost=$folder/jobs/$point.lost
    [[ ! -e $note ]] || { failed=1; continue; } # before a requeue, in this submission
    set_aside_lost # the shell of that attempt was killed, so it was not final
    code=0
    log_size=$(stat -c %s "$folder/jobs/$point.log" 2>/dev/null || echo 0)
    BIP_POINT=$point BIP_ATTEMPT=$(attempt_name) run_step --output="$folder/jobs/$point.log" --open-mode=append "$@" || code=$?
    ((code)) || continue
    failed=1
    [[ ! -e $note ]] || continue # a rank that could still speak has written why
    if [[ -z $reason && -e $lost ]]; then
      mv "$lost" "$note"
      continue
    fi
    reason=${reason:-exit code $code of srun; $(last_error)$(logs)}
    echo "{\"reason\": \"${reason//[\"\\]/}\"}" >"$note.new"
    mv "$note.new" "$note"
  done
  return "$failed"
}
