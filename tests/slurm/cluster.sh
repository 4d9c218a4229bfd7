#!/usr/bin/env bash
# A real Slurm of two nodes with two (imaginary) GPUs each, on this machine. As root it installs Slurm first.
#
#   cluster.sh start STATE              STATE is an empty folder with a short path; returns when jobs run on all nodes
#   cluster.sh stop STATE               ends whatever runs in the namespaces
#   cluster.sh on HOST STATE COMMAND... runs a command there: on node1, node2, or ctl for srun, sbatch, scancel
#   cluster.sh lose NODE STATE          the machine is gone, with all that runs on it
#   cluster.sh kill-daemon NODE STATE   its slurmd is gone; what it started lives on
#   cluster.sh cut|mend NODE STATE      its network cable
#   cluster.sh revive NODE STATE        all of that mended; returns when the node is idle
#
# A node, and the controller's host, is a set of namespaces of its own: network, host name, mounts and processes. They
# see the same disk, and reach each other by their names and by ssh without a password.
#
# Without root, and in a container that has too few rights, the nodes are daemons of this user on one host; a file
# STATE/loopback says so. They are called 127.0.0.1 and 127.0.0.2, for nothing would resolve node1. `on` runs a command
# here, whatever the HOST; there is no ssh between them; lose, cut and mend are refused.
set -euo pipefail

what=$1
case $what in start | stop) ;; *) node=$2; shift ;; esac
state=$2
net=10.77.0
nodes=(node1 node2)
[ ! -e "$state/loopback" ] || nodes=(127.0.0.{1,2})
export SLURM_CONF=$state/slurm.conf PATH=$PATH:/usr/sbin:/sbin

fail() { echo "tests/slurm: $*" >&2; exit 1; }

loopback() { [ -e "$state/loopback" ]; }

install_packages() {
  local program missing= programs=(slurmctld slurmd srun munged)
  loopback || programs+=(ip ssh sshd pdsh)
  for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing=yes; done
  [ "$missing" ] || return 0
  [ "$(id -u)" = 0 ] || fail "not all of ${programs[*]} are here, and only root can install them"
  # Exit code 101 keeps the packages from starting daemons of their own.
  local policy=/usr/sbin/policy-rc.d
  [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; trap "rm -f $policy" EXIT; }
  local packages=(slurmctld slurmd slurm-client munge iproute2 openssh-client openssh-server pdsh)
  local install=(apt-get install -y -q --no-install-recommends "${packages[@]}")
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" || { apt-get update -q && "${install[@]}"; } || fail "apt cannot install ${packages[*]}"
}

configure() {
  local user port=$((32001 + $$ % 250 * 3)) controller="ctl($net.254)" address=$net host=
  user=$(id -un)
  ! loopback || { host=$(hostname -s) address=127.0.0; controller="$host(127.0.0.1)"; }
  mkdir -p "$state"/{ctld,spool,log,gpu}
  chmod 755 "$state"
  (umask 077; head -c 1024 /dev/urandom >"$state/munge.key")
  printf '127.0.0.1 localhost\n%s.254 ctl\n%s.1 node1\n%s.2 node2\n' $net $net $net >"$state/hosts"
  # Without it slurmd looks for a cgroup mount, which a container may not have.
  echo "CgroupPlugin=cgroup/v1" >"$state/cgroup.conf"
  # Slurm sets CUDA_VISIBLE_DEVICES for character devices only.
  ln -s /dev/null "$state/gpu/nvidia0"
  ln -s /dev/null "$state/gpu/nvidia1"
  printf 'AutoDetect=off\nName=gpu Flags=nvidia_gpu_env File=%s/gpu/nvidia[0-1]\n' "$state" >"$state/gres.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$controller
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
# Jobs meet at a port that follows from their id; two clusters may share a host.
FirstJobId=$((RANDOM + 1))
AuthType=auth/munge
# A requeued job starts again no sooner than cred_expire seconds later.
AuthInfo=socket=$state/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
# A lost node is noticed some seconds after SlurmdTimeout.
SlurmdTimeout=8
MessageTimeout=5
InactiveLimit=0
KillWait=5
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc=$state/log/jobcomp.txt
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=${nodes[0]} NodeHostname=${host:-node1} NodeAddr=$address.1 Port=$((port + 1))
NodeName=${nodes[1]} NodeHostname=${host:-node2} NodeAddr=$address.2 Port=$((port + 2))
# What runs in all gives way to urgent: TERM, GraceTime seconds later KILL, and it is queued again.
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
}

make_keys() { # one for all hosts; ssh_config takes the place of the machine's in the namespaces only
  local key
  for key in id host_key; do ssh-keygen -q -t ed25519 -N '' -f "$state/$key"; done
  printf 'Host *\n  %s\n' >"$state/ssh_config" "IdentityFile $state/id" "StrictHostKeyChecking no" \
    "UserKnownHostsFile /dev/null" "LogLevel ERROR"
}

note() { # file pid: with the time of its start, for a process id may be used again
  echo "$2 $(cut -d ' ' -f 22 "/proc/$2/stat" 2>/dev/null)" >"$1" || true
}

alive() { # file: is its process running? Where nobody reaps, an ended one stays as a zombie
  local pid began status found
  [ -e "$1" ] && read -r pid began <"$1" && [ -e "/proc/$pid/stat" ] || return 1
  read -r status found < <(cut -d ' ' -f 3,22 "/proc/$pid/stat" 2>/dev/null)
  [ "$found" = "$began" ] && [ "$status" != Z ]
}

child() { # file: the process that its process has started
  local pid
  alive "$1" && read -r pid _ <"$1" && cat "/proc/$pid/task/$pid/children"
}

first() { child "$state/host-$1"; } # host: the first process in its namespaces

daemon_of() { # file: the daemon itself; where there are namespaces, nsenter has started it
  ! alive "$1" || if loopback; then cut -d ' ' -f 1 "$1"; else child "$1"; fi
}

on() { # host command...: in its namespaces
  # That the nodes are one host is no mistake here.
  ! loopback || GLOO_SOCKET_IFNAME=lo exec "${@:2}"
  # Not --wd: a folder entered from outside is of another mount, and nothing can be renamed from there to a whole path.
  exec nsenter -t $(first "$1") --net --uts --mount --pid -- env --chdir="$PWD" "${@:2}"
}

start_host() { # name: its namespaces, kept by a first process that reaps orphans
  rm -f "$state/up-$1"
  setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash -c '
    hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/ssh_config" /etc/ssh/ssh_config
    ip link set lo up; : >"$2/up-$1"
    trap "exit 0" TERM; while :; do sleep 3600 & wait -n; done' host "$1" "$state" </dev/null >"$state/log/$1.log" 2>&1 &
  note "$state/host-$1" $!
  until [ -e "$state/up-$1" ]; do
    alive "$state/host-$1" || fail "no namespaces for $1: $(cat "$state/log/$1.log")"
    sleep 0.05
  done
}

wire() { # host command...: ip, in its network
  nsenter -t $(first "$1") --net ip "${@:2}"
}

make_bridge() { # on ctl
  wire ctl link add bridge type bridge
  wire ctl addr add $net.254/24 dev bridge
  wire ctl link set bridge up
}

make_hosts() { # with their network
  make_keys
  for host in ctl "${nodes[@]}"; do start_host "$host"; done
  make_bridge
  for node in "${nodes[@]}"; do connect "$node"; done
}

connect() { # node: a cable to the bridge
  local number=${1#node}
  # The cable of a node that was lost goes with it, in a while.
  ! wire ctl link show "to$number" >/dev/null 2>&1 || wire ctl link delete "to$number" || true
  wire ctl link add "to$number" type veth peer name eth0 netns $(first "$1")
  wire ctl link set "to$number" master bridge up
  wire "$1" addr add "$net.$number/24" dev eth0
  wire "$1" link set eth0 up
}

cable() { # node up|down
  wire ctl link set "to${1#node}" "$2"
}

daemon() { # host command...
  local name=${2##*/}
  setsid "$0" on "$1" "$state" "${@:2}" </dev/null >>"$state/log/$name.$1.out" 2>&1 &
  note "$state/$name-$1" $!
}

start_node_daemons() { # node: those that do not run
  alive "$state/slurmd-$1" || daemon "$1" slurmd -D -N "$1"
  ! loopback || return 0
  # sshd wants its whole path, and a folder that a system's start would have made.
  mkdir -p /run/sshd
  alive "$state/sshd-$1" || daemon "$1" "$(command -v sshd)" -D -e -f /dev/null -o HostKey="$state/host_key" \
    -o PidFile=none -o StrictModes=no -o AuthorizedKeysFile="$state/id.pub" -o PasswordAuthentication=no
}

try() { # seconds command...: until it succeeds
  local until=$((SECONDS + $1))
  until (timeout 10 "${@:2}") >>"$state/log/try.out" 2>&1; do
    [ $SECONDS -lt $until ] || { tail -n 20 "$state"/log/* >&2; fail "not in $1 s: ${*:2}"; }
    sleep 0.2
  done
}

idle() { # node: is it? One that was down or drained has to be told
  local now
  now=$("$0" on ctl "$state" sinfo --noheader --partition=all --Node --nodes="$1" --format=%T)
  [ "$now" != idle ] || return 0
  "$0" on ctl "$state" scontrol update "nodename=$1" state=resume || true
  return 1
}

start() {
  mkdir -p "$state"
  unshare --net --uts --mount --pid --fork true 2>/dev/null || { : >"$state/loopback"; nodes=(127.0.0.{1,2}); }
  install_packages >"$state/apt.log" 2>&1 || { cat "$state/apt.log" >&2; exit 1; }
  configure
  loopback || make_hosts
  daemon ctl munged --foreground --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
    --pid-file="$state/munged.pid" --log-file="$state/log/munged.log" --seed-file="$state/munged.seed"
  try 20 munge --socket="$state/munge.socket" --no-input
  daemon ctl slurmctld -D
  for node in "${nodes[@]}"; do start_node_daemons "$node"; done
  # A node that calls itself idle may still refuse its first step.
  try 60 "$0" on ctl "$state" timeout 8 srun --nodes=2 --overcommit true
}

revive() { # node
  loopback || [ "$(first "$1")" ] || { start_host "$1"; connect "$1"; }
  loopback || cable "$1" up
  start_node_daemons "$1"
  try 60 "$0" idle "$1" "$state"
}

stop_loopback() { # the steps first, which would outlive the daemons
  local name
  if alive "$state/slurmctld-ctl"; then
    for node in "${nodes[@]}"; do start_node_daemons "$node"; done
    timeout 10 scancel --user="$(id -un)" || true
    (try 30 bash -c '[ -z "$(squeue --noheader)" ]') || true
  fi
  for name in "${nodes[@]/#/slurmd-}" slurmctld-ctl munged-ctl; do
    kill -KILL $(daemon_of "$state/$name") 2>/dev/null || true
  done
}

stop_hosts() { # the end of a first process is the end of all in its namespaces; unshare goes with it
  for host in ctl "${nodes[@]}"; do kill -KILL $(first "$host") 2>/dev/null || true; done
}

case $what in lose | cut | mend) ! loopback || fail "$what needs nodes with namespaces of their own: root" ;; esac
case $what in
  start) start ;;
  on) on "$node" "${@:3}" ;;
  lose) kill -KILL $(first "$node") ;;
  kill-daemon) kill -KILL $(daemon_of "$state/slurmd-$node") ;;
  cut) cable "$node" down ;;
  mend) cable "$node" up ;;
  revive) revive "$node" ;;
  idle) idle "$node" ;;
  stop) if loopback; then stop_loopback; else stop_hosts; fi ;;
  *) fail "unknown: $what" ;;
esac
