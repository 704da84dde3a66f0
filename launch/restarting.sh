#!/bin/bash
# Runs a command again after each failure that restarting can help, one host's part of a run:
#
#   launch/restarting.sh MAX_RESTARTS COMMAND...
#
# 0, 77, 78 and 130 end it (launch/README.md), and so does SIGTERM, which goes on to the command. The other hosts of
# the run lose a peer at the same moment and start again as well; they meet when the command begins.
# With VLMJAX_RUN_FILES=PATH, PATH.pid is this process while it runs and PATH.code its exit code afterwards.
set -u
max_restarts=$1
shift
pause=${VLMJAX_RESTART_SECONDS:-10} # for a TPU or a port to be free again

stopped=0 caught=0 child=
# shellcheck disable=SC2329  # the trap calls it
stop() {
  stopped=1 caught=1
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM
files=${VLMJAX_RUN_FILES:-}
if [ -n "$files" ]; then
  rm -f "$files.code"
  echo $$ >"$files.pid"
fi

for ((try = 0; ; try++)); do
  "$@" </dev/null &
  child=$!
  while true; do # a signal ends `wait`, not the command
    caught=0
    wait "$child"
    code=$?
    ((caught)) || break
  done
  case $code in 0 | 77 | 78 | 130) break ;; esac
  ((stopped || try >= max_restarts)) && break
  echo "[vlmjax] exit code $code: starting again ($((try + 1)) of at most $max_restarts)"
  child=
  sleep "$pause" &
  wait $!
  ((stopped)) && break
done
echo "[vlmjax] ended with exit code $code"
[ -z "$files" ] || echo "$code" >"$files.code"
exit "$code"
