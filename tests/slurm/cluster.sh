#!/usr/bin/env bash
# A Slurm cluster of one node, this machine, on loopback, for trying launcher=slurm. As root, without systemd.
#
#   tests/slurm/cluster.sh start      installs nothing; says what is missing
#   tests/slurm/cluster.sh stop
#
# Debian: apt-get install slurm-wlm munge. Everything that it writes lies in $SLURM_HOME (default /tmp/pmpd-slurm).
set -euo pipefail
home=${SLURM_HOME:-/tmp/pmpd-slurm}
conf=$home/slurm.conf
export SLURM_CONF=$conf

need() { command -v "$1" >/dev/null || { echo "no $1 here: apt-get install slurm-wlm munge" >&2; exit 3; }; }

running() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

start() {
    for program in munged slurmctld slurmd sinfo; do need $program; done
    [ "$(id -u)" = 0 ] || { echo "this starts daemons as root" >&2; exit 3; }
    mkdir -p "$home"/{state,spool,log,run}
    if [ ! -s /etc/munge/munge.key ]; then
        (umask 077; head -c 1024 /dev/urandom >/etc/munge/munge.key)
        chown munge: /etc/munge/munge.key
    fi
    if ! munge -n >/dev/null 2>&1; then
        mkdir -p /run/munge && chown munge: /run/munge
        runuser -u munge -- /usr/sbin/munged
    fi
    host=$(hostname -s)
    cat >"$conf" <<CONF
ClusterName=pmpd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SchedulerParameters=sched_interval=2,requeue_setup_env_fail
MinJobAge=600
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1024 - 512)) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    running "$home/run/slurmctld.pid" || slurmctld -c -f "$conf"
    running "$home/run/slurmd.pid" || slurmd -f "$conf"
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$conf"
            return
        fi
        sleep 0.5
    done
    echo "the node did not come up; see $home/log" >&2
    tail -5 "$home"/log/*.log >&2
    exit 1
}

stop() {
    for daemon in slurmd slurmctld; do
        running "$home/run/$daemon.pid" && kill "$(cat "$home/run/$daemon.pid")"
    done
    for _ in $(seq 40); do
        running "$home/run/slurmd.pid" || running "$home/run/slurmctld.pid" || break
        sleep 0.25
    done
    rm -rf "$home"
}

case ${1:-} in
start) start ;;
stop) stop ;;
*) sed -n '2,7p' "$0"; exit 2 ;;
esac
