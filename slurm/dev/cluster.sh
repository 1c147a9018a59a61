#!/usr/bin/env bash
# A real SLURM cluster on this one machine, for tests: munge, MariaDB, slurmdbd, slurmctld and one
# slurmd per node. Needs root and Debian's packages (installed where missing), but no systemd.
#
#   cluster.sh up [options]      start it; prints the line that makes SLURM's commands use it
#   cluster.sh status            daemons, nodes, jobs, accounting
#   cluster.sh down              end its jobs, stop it and delete its folder
#   cluster.sh fail NODE         a node failure: SIGKILL to the slurmd of NODE and to its jobs
#   cluster.sh recover NODE      bring a failed node back
#   cluster.sh restart DAEMON    mariadbd, slurmdbd, slurmctld or a node's slurmd; jobs live on
#
# Every command takes --dir DIR, the folder that holds all of it (${TMPDIR:-/tmp}/slurm-dev).
# Clusters in different folders run side by side, and beside a SLURM installed on this machine.
# Options of up, with their defaults:
#
#   --nodes N (2)            nodes n1 to nN
#   --cpus N (4)             CPUs of a node; they need not exist
#   --gpus N (0)             GPUs of a node; device files that do nothing
#   --grace-time S (10)      GraceTime of the partition `low`; SLURM looks only every 30 s
#   --kill-wait S (30)       KillWait, the time from SIGTERM to SIGKILL
#   --send-user-signal       on preemption send the job's --signal instead of SIGTERM
#   --job-requeue 0|1 (1)    JobRequeue
#   --preempt-mode REQUEUE|CANCEL (REQUEUE)   what becomes of a preempted job
#   --requeue-delay S (120)  how long a requeued job waits before it may start again. The same
#                            setting (cred_expire) is a launch's time limit, so not below 5
#   --max-array-size N (1001)
#
# Partitions: `low` (the default; its jobs are preempted) and `high` (preempts them).
# Exit status: 0; 1 no cluster runs; 2 an error; 3 this machine cannot host a cluster.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin

die() { echo "error: $*" >&2; exit "${code:-2}"; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# ---- what belongs to this cluster ------------------------------------------------------------
# The marker file in the folder holds the cluster's id and the folder's path. Every daemon carries
# SLURM_DEV_CLUSTER=ID/NAME in its environment, and slurmstepd inherits its slurmd's. A job's
# processes carry this cluster's SLURM_CONF and one of its nodes as SLURM's own SLURMD_NODENAME; the
# shell of somebody who uses the cluster has none, or that of another cluster around it. Nothing
# else is ever signalled, and nothing that this script runs under.

use() { # an existing folder, if it is ours
  [[ -e $dir ]] || { echo "no cluster in $dir"; [[ $action == down ]]; exit; }
  local path=
  [[ ! -O $dir/.slurm-dev-cluster ]] || read -r id path <"$dir/.slurm-dev-cluster"
  [[ $path == "$dir" && $id =~ ^[0-9a-f-]{36}$ ]] ||
    die "$dir was not made by cluster.sh up: left as it is"
}

nodes() { # names of the cluster's nodes
  local file
  for file in "$dir"/run/n[0-9]*.pid; do [[ ! -e $file ]] || basename "$file" .pid; done
}

ancestors() { # pids of this script and of all above it
  local pid=$$
  while ((pid)); do
    echo "$pid"
    pid=$(sed -n 's/^PPid:\t//p' "/proc/$pid/status")
  done
}

processes() { # [NAME]: pids of the cluster's processes, or of one daemon's and its jobs'
  local names
  names=$(sed 's/^/SLURMD_NODENAME=/' <<<"${1:-$(nodes)}")
  {
    grep -lzs "^SLURM_DEV_CLUSTER=$id/${1:-.*}$" /proc/[0-9]*/environ || true
    grep -lzsxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ |
      xargs -r grep -lzsxF "$names" || true
  } | tr -dc '0-9\n' | grep -vxF "$(ancestors)" || true
}

kill_all() { # [NAME]
  local pids
  while pids=$(processes "$@") && [[ $pids ]]; do # a job may fork while we look
    xargs kill -KILL <<<"$pids" 2>/dev/null || true
    sleep 0.05
  done
}

running() { # NAME
  local pid
  pid=$(cat "$dir/run/$1.pid" 2>/dev/null) &&
    grep -qzs "^SLURM_DEV_CLUSTER=$id/$1$" "/proc/$pid/environ"
}

# ---- daemons ---------------------------------------------------------------------------------

launch() { # NAME: start a daemon and wait until it answers
  local command
  case $1 in
    munged) command=(munged --foreground "--socket=$dir/run/munge.socket" --num-threads=2
      "--key-file=$dir/etc/munge.key" "--pid-file=$dir/run/munge.lock"
      "--seed-file=$dir/run/munge.seed") ;;
    mariadbd) command=(mariadbd "--defaults-file=$dir/etc/my.cnf") ;;
    slurmdbd) command=(slurmdbd -D) ;;
    slurmctld) command=(slurmctld -D) ;;
    *) command=(slurmd -D -N "$1") ;;
  esac
  (
    cd "$dir"
    exec env -i "PATH=$PATH" HOME=/root "SLURM_CONF=$SLURM_CONF" "SLURM_DEV_CLUSTER=$id/$1" \
      "MYSQL_UNIX_PORT=$dir/run/mariadb.socket" setsid "${command[@]}" \
      </dev/null >>"$dir/log/$1.out" 2>&1
  ) &
  echo $! >"$dir/run/$1.pid"
  disown # or bash would report its end
  await "$1"
}

await() { # NAME
  local deadline=$((SECONDS + 60))
  until answers "$1" &>/dev/null; do
    if ! kill -0 "$(<"$dir/run/$1.pid")" 2>/dev/null || ((SECONDS > deadline)); then
      die "$1 does not answer; it said:"$'\n'"$(tail -n 15 "$dir/log/$1.out")"
    fi
    sleep 0.1
  done
}

answers() { # NAME
  case $1 in
    munged) munge --socket="$dir/run/munge.socket" --no-input ;;
    mariadbd) mariadb --no-defaults --socket="$dir/run/mariadb.socket" -e 'select 1' ;;
    slurmdbd) : <"/dev/tcp/127.0.0.1/$(sed -n 's/^DbdPort=//p' "$dir/etc/slurmdbd.conf")" ;;
    slurmctld) scontrol ping ;;
    *) [[ $(sinfo -h -n "$1" -p low -o %T) =~ ^(idle|mix|alloc|compl)[a-z]*$ ]] ;;
  esac
}

# ---- up --------------------------------------------------------------------------------------

install_packages() { # those whose command is missing, without starting or enabling a service
  local pair missing=() policy=/usr/sbin/policy-rc.d log
  for pair in munged:munge mariadbd:mariadb-server-core mariadb:mariadb-client-core \
    slurmdbd:slurmdbd slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || code=3 die "no apt-get: install ${missing[*]} by other means"
  echo "installing ${missing[*]}"
  if ! log=$(
    exec 2>&1 9</var/lib/dpkg
    flock 9 # against another cluster.sh doing the same
    # Debian starts services on installation unless this file says no.
    [[ ! -e $policy ]] || mv "$policy" "$policy.saved"
    trap 'rm "$policy"; [[ ! -e $policy.saved ]] || mv "$policy.saved" "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update || true # the lists at hand may do
    apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends "${missing[@]}"
  ); then
    log=$(grep -m1 "^E:" <<<"$log" || tail -n 1 <<<"$log")
    code=3 die "apt-get could not install ${missing[*]}; it says $log"
  fi
  systemctl disable "${missing[@]}" &>/dev/null || true # nor at the next boot
}

choose_ports() { # free ones in a row, below the range of outgoing connections
  local first=$((20000 + RANDOM % 10000)) port
  for ((port = first; port < first + value[nodes] + 2; port++)); do
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then choose_ports && return; fi
  done
  value+=([ctld_port]=$first [dbd_port]=$((first + 1)) [first_port]=$((first + 2))
    [last_port]=$((port - 1)))
}

configure() { # the templates beside this script, with @name@ replaced by value[name]
  local file text name i host
  host=$(uname -n)
  value+=([dir]=$dir [host]=${host%%.*} [max_job_count]=$((10000 + value[max_array_size])))
  choose_ports
  mkdir "$dir"/{etc,run,log,state,dev,spool}
  for file in slurm.conf slurmdbd.conf my.cnf; do
    text=$(<"$here/$file")
    for name in "${!value[@]}"; do text=${text//@$name@/${value[$name]}}; done
    (umask 077 && echo "$text" >"$dir/etc/$file")
  done
  chmod 644 "$dir/etc/slurm.conf"
  ((!value[send_user_signal])) || # later versions take it, and PreemptParameters=send_user_signal
    echo SlurmctldParameters=preempt_send_user_signal >>"$dir/etc/slurm.conf"
  : >"$dir/etc/plugstack.conf"
  for ((i = 1; i <= value[nodes]; i++)); do mkdir "$dir/spool/n$i"; done
  # SLURM insists on device files for GPUs; these are /dev/null by another name.
  for ((i = 0; i < value[gpus]; i++)); do mknod "$dir/dev/gpu$i" c 1 3; done
  ((!value[gpus])) || echo "Name=gpu File=$dir/dev/gpu[0-$((i - 1))]" >"$dir/etc/gres.conf"
  (umask 077 && head -c 128 /dev/urandom >"$dir/etc/munge.key")
  echo "export SLURM_CONF=$SLURM_CONF" >"$dir/env.sh"
}

up() {
  if [[ -e $dir/.slurm-dev-cluster ]]; then
    use
    [[ $(processes) ]] || die "$dir holds a stopped cluster: cluster.sh down --dir $dir first"
    echo "already running, with the options it was started with"
    cat "$dir/env.sh"
    return
  fi
  [[ ! -e $dir || (-O $dir && ! $(ls -A "$dir")) ]] ||
    die "--dir: $dir is neither new nor an empty folder of root's"
  install_packages
  [[ -e $dir ]] || mkdir "$dir" || exit 2
  chmod 755 "$dir"
  id=$(</proc/sys/kernel/random/uuid)
  echo "$id $dir" >"$dir/.slurm-dev-cluster"
  trap down EXIT # a cluster that did not start leaves nothing either
  configure
  SLURM_DEV_CLUSTER=$id/install mariadb-install-db "--defaults-file=$dir/etc/my.cnf" \
    --skip-test-db --auth-root-authentication-method=socket &>"$dir/log/install.out" ||
    die "mariadb-install-db said:"$'\n'"$(tail -n 5 "$dir/log/install.out")"
  local name
  for name in munged mariadbd slurmdbd slurmctld $(seq -f n%g "${value[nodes]}"); do
    launch "$name"
  done
  trap - EXIT
  cat "$dir/env.sh"
}

# ---- the other commands ----------------------------------------------------------------------

down() {
  kill_all # at once: all that the daemons would save is deleted with the folder
  rm -rf --one-file-system "$dir"
}

status() {
  local file name
  [[ $(processes) ]] || { echo "the cluster in $dir is stopped"; exit 1; }
  for file in "$dir"/run/*.pid; do
    name=$(basename "$file" .pid)
    running "$name" && echo "$name: running" || echo "$name: NOT running"
  done
  printf '\n%s\n\n%s\n\n' "$(sinfo)" "$(squeue)"
  [[ $(sacctmgr --noheader --parsable2 show cluster format=cluster,controlport) == dev\|[1-9]* ]] &&
    echo "accounting: works" || echo "accounting: DOES NOT WORK (see $dir/log/slurmdbd.log)"
  cat "$dir/env.sh"
}

fail() { # NODE
  kill_all "$1"
  # Told now, slurmctld need not find out after SlurmdTimeout (300 s).
  scontrol update NodeName="$1" State=DOWN Reason="cluster.sh fail"
}

recover() { # NODE
  ! running "$1" || die "$1 is running"
  launch "$1"
}

restart() { # DAEMON
  local name
  ! running "$1" || kill "$(<"$dir/run/$1.pid")"
  while running "$1"; do sleep 0.1; done
  launch "$1"
  [[ $1 == slurmctld ]] || return 0
  for name in $(nodes); do # it knows no node before that has registered again
    ! running "$name" || await "$name"
  done
}

# ---- command line ----------------------------------------------------------------------------

options() { # of the action; sets dir and value
  local name
  dir=${TMPDIR:-/tmp}/slurm-dev
  declare -gA value=([nodes]=2 [cpus]=4 [gpus]=0 [grace_time]=10 [kill_wait]=30
    [send_user_signal]=0 [job_requeue]=1 [preempt_mode]=REQUEUE [requeue_delay]=120
    [max_array_size]=1001)
  while (($#)); do
    name=${1#--} name=${name//-/_}
    if [[ $1 == --dir ]]; then
      [[ ${2-} ]] || die "--dir needs a folder"
      dir=$2
      shift
    elif [[ ! $1 =~ ^--[a-z-]+$ || ! -v value[$name] ]]; then
      die "unknown option '$1' (see cluster.sh --help)"
    elif [[ $action != up ]]; then
      die "$1 is an option of up"
    elif [[ $name == send_user_signal ]]; then
      value[$name]=1
    elif [[ $name == preempt_mode ]]; then
      [[ ${2-} =~ ^(REQUEUE|CANCEL)$ ]] || die "$1 is REQUEUE or CANCEL, not '${2-}'"
      value[$name]=$2
      shift
    else
      [[ ${2-} =~ ^(0|[1-9][0-9]{0,6})$ ]] || die "$1 needs a whole number, not '${2-}'"
      value[$name]=$2
      shift
    fi
    shift
  done
  ((value[nodes] >= 1 && value[nodes] <= 64)) || die "--nodes is 1 to 64"
  ((value[cpus] && value[max_array_size])) || die "--cpus and --max-array-size are at least 1"
  ((value[max_array_size] <= 4000001)) || die "--max-array-size is at most 4000001"
  ((value[job_requeue] <= 1)) || die "--job-requeue is 0 or 1"
  ((value[requeue_delay] >= 5)) || die "--requeue-delay is at least 5"
  dir=$(realpath -m -- "$dir")
  # Sockets lie below it, and the path of a socket has at most 107 characters.
  [[ $dir =~ ^/[A-Za-z0-9/._+-]{1,63}$ ]] ||
    die "--dir: at most 64 characters, of letters, digits and / . _ + -, not $dir"
}

(($#)) || { usage >&2; exit 2; }
given=("$@")
action=$1 name=
shift
case $action in
  -h | --help | help) usage; exit ;;
  up | down | status) ;;
  fail | recover | restart)
    name=${1-}
    shift || die "$action needs a name" ;;
  *) die "unknown command '$action'; known: up status down fail recover restart" ;;
esac
options "$@"
((EUID == 0)) || code=3 die "root is needed to run a cluster"
# Inside a job, what this script starts is not to look like the job's processes.
[[ ! -v SLURMD_NODENAME ]] || exec env -u SLURMD_NODENAME bash "${BASH_SOURCE[0]}" "${given[@]}"
unset "${!SLURM@}" "${!SBATCH_@}" "${!SINFO_@}" "${!SQUEUE_@}" # those of another cluster
export SLURM_CONF=$dir/etc/slurm.conf
[[ $action == up ]] || use
if [[ $name ]]; then
  [[ -e $dir/run/$name.pid ]] || die "no daemon '$name' in $dir"
  [[ $action == restart || $name == n[0-9]* ]] || die "$name is no node"
fi
"$action" "$name"
