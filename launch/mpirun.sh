# mpirun.sh: how the scripts of launch/ call OpenMPI's mpirun. Sourced, not run.
# shellcheck shell=bash

# cores: those that this process may use, whatever OMP_NUM_THREADS says.
cores() {
  env -u OMP_NUM_THREADS nproc
}

# threads_for RANKS: threads a rank, where so many share this machine's cores.
threads_for() {
  local threads=$(($(cores) / $1))
  echo $((threads > 0 ? threads : 1))
}

# mpirun_options RANKS: sets the array `options`. Ranks are not bound to cores: threads share them.
mpirun_options() {
  options=(--quiet --oversubscribe --bind-to none -n "$1")
  [[ $(id -u) -ne 0 ]] || options+=(--allow-run-as-root)
}

# run_ranks GUARD COMMAND...: runs an mpirun that Ctrl-C, SIGTERM, SIGUSR1 and a lost terminal ask for a checkpoint:
# they become the SIGUSR1 that mpirun hands on to its ranks, while Ctrl-C itself would make it kill them after a
# second. The second time they end the job. Returns mpirun's exit code. GUARD, the name of a function,
# runs beside it with mpirun's process id.
run_ranks() {
  local guard=$1 term=${TERM:-dumb} status=0
  shift
  [[ -t 1 ]] || term=dumb  # ranks always see a terminal; plain lines for a log
  TERM=$term setsid "$@" </dev/null &
  job=$! asked=0 last_request=none
  exec {told}>&2
  local signal
  for signal in INT TERM USR1 HUP; do
    # shellcheck disable=SC2064  # the signal's name, now
    trap "stop_ranks $signal" "$signal"
  done
  "$guard" "$job" &
  while kill -0 "$job" 2>/dev/null; do
    status=0
    { wait "$job" || status=$?; } 2>/dev/null  # bash would tell how it ended
  done
  trap - INT TERM USR1 HUP
  return "$status"
}

# Leaves the signal's name in last_request.
stop_ranks() {
  last_request=$1
  if ((asked++ == 0)); then
    printf '\nasked to stop: a checkpoint is written first; once more ends at once\n' >&"$told" || true
    kill -USR1 "$job"
  else
    kill -TERM "$job"
  fi
}
