#!/usr/bin/env bash
# cluster.sh start STATE | stop STATE | on NODE STATE COMMAND...    A real Slurm of two nodes on this machine, as root.
#
# A node, and the controller's host, is a set of namespaces of its own: network, host name, mounts and processes. `on`
# runs a command there (node1, node2, or ctl for srun, sbatch, scancel); they see the same disk. STATE is an empty folder
# with a short path; `start` returns when jobs run on all nodes, `stop` ends whatever runs in the namespaces.
set -euo pipefail

what=$1
[ "$what" = on ] && { node=$2; shift; }
state=$2
net=10.77.0
hosts=(ctl node1 node2)
export SLURM_CONF=$state/slurm.conf PATH=$PATH:/usr/sbin:/sbin

install_packages() {
  local program missing=
  for program in slurmctld slurmd srun munged ip; do command -v $program >/dev/null || missing=yes; done
  [ "$missing" ] || return 0
  # Exit code 101 keeps the packages from starting daemons of their own.
  local policy=/usr/sbin/policy-rc.d
  [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; trap "rm -f $policy" EXIT; }
  local install=(apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge iproute2)
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" || { apt-get update -q && "${install[@]}"; }
}

configure() {
  mkdir -p "$state"/{ctld,spool,log}
  chmod 755 "$state"
  (umask 077; head -c 1024 /dev/urandom >"$state/munge.key")
  printf '127.0.0.1 localhost\n%s.254 ctl\n%s.1 node1\n%s.2 node2\n' $net $net $net >"$state/hosts"
  # Without it slurmd looks for a cgroup mount, which a container may not have.
  echo "CgroupPlugin=cgroup/v1" >"$state/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl($net.254)
SlurmUser=root
SlurmdUser=root
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
SlurmdTimeout=12
InactiveLimit=0
KillWait=3
MinJobAge=3600
JobAcctGatherType=jobacct_gather/none
NodeName=node1 NodeAddr=$net.1 CPUs=4 RealMemory=4000
NodeName=node2 NodeAddr=$net.2 CPUs=4 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
CONF
}

first() { # host: the first process in its namespaces
  cat "/proc/$(cat "$state/host-$1.pid")/task/"*/children
}

on() { # host command...: in its namespaces
  exec nsenter -t $(first "$1") --net --uts --mount --pid --wd="$PWD" -- "${@:2}"
}

start_host() { # name: its namespaces, kept by a first process that reaps orphans
  setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash -c '
    hostname "$1"; mount --bind "$2/hosts" /etc/hosts; ip link set lo up; : >"$2/up-$1"
    trap "exit 0" TERM; while :; do sleep 3600 & wait -n; done' host "$1" "$state" </dev/null >"$state/log/$1.log" 2>&1 &
  echo $! >"$state/host-$1.pid"
  until [ -e "$state/up-$1" ]; do sleep 0.05; done
}

wire() { # host command...: ip, in its network
  nsenter -t $(first "$1") --net ip "${@:2}"
}

connect() { # a bridge on ctl, a cable to each node
  wire ctl link add bridge type bridge
  wire ctl addr add $net.254/24 dev bridge
  wire ctl link set bridge up
  for number in 1 2; do
    wire ctl link add "to$number" type veth peer name eth0 netns $(first "node$number")
    wire ctl link set "to$number" master bridge up
    wire "node$number" addr add "$net.$number/24" dev eth0
    wire "node$number" link set eth0 up
  done
}

daemon() { # node command...
  setsid "$0" on "$1" "$state" "${@:2}" </dev/null >>"$state/log/$(basename "$2").$1.out" 2>&1 &
}

try() { # seconds command...: until it succeeds
  local until=$((SECONDS + $1))
  until (timeout 10 "${@:2}") >>"$state/log/try.out" 2>&1; do
    [ $SECONDS -lt $until ] || { echo "not in $1 s: ${*:2}" >&2; tail -n 20 "$state"/log/* >&2; exit 1; }
    sleep 0.2
  done
}

case $what in
  start)
    mkdir -p "$state"
    install_packages >"$state/apt.log" 2>&1 || { cat "$state/apt.log" >&2; exit 1; }
    configure
    for host in "${hosts[@]}"; do start_host "$host"; done
    connect
    daemon ctl munged --foreground --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
      --pid-file="$state/munged.pid" --log-file="$state/log/munged.log" --seed-file="$state/munged.seed"
    try 20 munge --socket="$state/munge.socket" --no-input
    daemon ctl slurmctld -D
    for node in node1 node2; do daemon "$node" slurmd -D -N "$node"; done
    # A node that calls itself idle may still refuse its first step.
    try 60 "$0" on ctl "$state" timeout 8 srun --nodes=2 --overcommit true
    ;;
  on) on "$node" "${@:3}" ;;
  stop)
    # The end of a first process is the end of all in its namespaces; unshare goes with it.
    for host in "${hosts[@]}"; do
      [ ! -e "$state/host-$host.pid" ] || kill -KILL $(first "$host") || true
    done
    ;;
esac
