#!/bin/bash
# A run on all hosts of a Cloud TPU pod slice: created or reused, installed, started, watched, created again.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE [options] COMMAND [-- ARGUMENTS OF vlmjax.main]
#
#   train     up, install, run, watch: the whole of it
#   up        create the slice, or reuse it; one that was preempted is deleted first
#   install   copy this tree (its last commit) to every host and install it there
#   run       start the run on every host; each starts again after a failure
#   watch     until the run ends; after a preemption everything is done again
#   logs      follow the output of one host (--worker=N, 0)
#   status    the last line of every host
#   stop      SIGTERM on every host: the run saves and ends
#   delete    give the slice back
#
#   --type=v5litepod-64   --version=v2-alpha-tpuv5-lite   --project=P   --spot   --max_restarts=N (20)
#   --dry-run             print the gcloud commands and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."

name='' zone='' project='' type=v5litepod-64 version=v2-alpha-tpuv5-lite spot='' worker=0 dry_run='' max_restarts=20
die() { echo "launch/tpu_pod.sh: $*" >&2; exit 2; }
command=''
while [ $# -gt 0 ]; do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --version=* | --worker=* | --max_restarts=*)
      option=${1%%=*}
      printf -v "${option#--}" '%s' "${1#*=}"
      ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    -*) die "unknown option $1; --help lists them" ;;
    *) [ -z "$command" ] || die "one command, not $command and $1"; command=$1 ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || die "--name and --zone are needed"
where=(--zone="$zone" ${project:+--project="$project"})
poll=${VLMJAX_POLL_SECONDS:-60}

tpu() { # VERB ARGUMENTS...: one gcloud command
  local verb=$1
  shift
  if [ -n "$dry_run" ]; then
    printf 'gcloud compute tpus tpu-vm %s' "$verb"
    printf ' %q' "$@" "${where[@]}"
    echo
  else
    gcloud compute tpus tpu-vm "$verb" "$@" "${where[@]}"
  fi
}
on() { tpu ssh "$name" --worker="$1" --command="$2"; } # WORKER SHELL-COMMAND

state() { # READY, PREEMPTED...; nothing when there is no such slice. Fails when gcloud does.
  tpu list --filter="name ~ (^|/)$name\$" --format='value(state)'
}

up() {
  local found
  if [ -n "$dry_run" ]; then state; found=; else found=$(state); fi
  case $found in
    READY) echo "reusing $name"; return ;;
    PREEMPTED | TERMINATED) tpu delete "$name" --quiet ;;
    '') ;;
    *) die "$name is $found: neither ready nor gone; try again" ;;
  esac
  tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

install() {
  local archive=${TMPDIR:-/tmp}/vlmjax-$$.tar.gz
  [ -n "$dry_run" ] || git archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$name:vlmjax.tar.gz" --worker=all
  rm -f "$archive"
  on all 'set -e; mkdir -p vlmjax; tar xzf vlmjax.tar.gz -C vlmjax; cd vlmjax
    command -v python3.11 >/dev/null || sudo apt-get install -qy python3.11-venv
    python3.11 -m venv .venv; .venv/bin/pip install -q -e ".[tpu,gcs]"'
}

run() { # a host where it runs already is left alone
  local arguments
  printf -v arguments ' %q' "$@"
  on all "cd vlmjax; if kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; then echo runs already; exit; fi; rm -f run.code
    PYTHONUNBUFFERED=1 VLMJAX_RUN_FILES=run nohup setsid bash launch/restarting.sh $max_restarts \
      .venv/bin/python -m vlmjax.main$arguments >>run.log 2>&1 </dev/null &"
}

watch() {
  local found code
  [ -z "$dry_run" ] || { state; on 0 'cat vlmjax/run.code'; return; }
  while true; do
    sleep "$poll"
    found=$(state) || continue # gcloud could not say
    case $found in
      READY)
        code=$(on 0 'cat vlmjax/run.code 2>/dev/null || true') || continue
        [ -z "$code" ] || { echo "ended with exit code $code"; exit "$code"; }
        ;;
      PREEMPTED | TERMINATED | '')
        echo "$name is ${found:-gone}: once more"
        if up && install; then run "$@"; fi
        ;;
    esac
  done
}

case $command in
  up | install) "$command" ;;
  run | watch) [ $# -gt 0 ] || die "$command needs the arguments of vlmjax.main after --"; "$command" "$@" ;;
  train) [ $# -gt 0 ] || die "train needs the arguments of vlmjax.main after --"; up; install; run "$@"; watch "$@" ;;
  logs) on "$worker" 'tail -n 100 -F vlmjax/run.log' ;;
  status) on all 'tail -n 1 vlmjax/run.log' ;;
  stop) on all "kill -TERM \$(cat vlmjax/run.pid)" ;;
  delete) tpu delete "$name" --quiet ;;
  *) die "unknown command ${command:-''}; --help lists them" ;;
esac
