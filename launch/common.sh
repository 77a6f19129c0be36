# common.sh: what the scripts of launch/ share. Sourced, not run; leaves the caller in the
# repository root, with strict error handling.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'printf "\nstopped; run it again to continue\n" >&2; exit 130' INT

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# logged LOG LABEL COMMAND...: runs the command with its output in LOG; prints one line with its
# time, and the end of LOG if it fails.
logged() {
  local log=$1 label=$2 start=$SECONDS status=0
  shift 2
  mkdir -p "$(dirname "$log")"
  printf '%-22s ' "$label"
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if ((status == 0)); then
    printf '%4d s\n' $((SECONDS - start))
    return
  fi
  printf 'failed\n'
  tail -n 40 "$log" >&2
  fail "$label: exit code $status; the whole output is in $log"
}

# cores: those that this process may use, whatever OMP_NUM_THREADS says.
cores() {
  env -u OMP_NUM_THREADS nproc
}

# on_ranks N COMMAND...: runs the command on N ranks of this machine, which share its cores.
on_ranks() {
  local ranks=$1 threads=$(($(cores) / $1))
  shift
  local -a options=(--quiet --oversubscribe --bind-to none -n "$ranks")
  [[ $(id -u) -ne 0 ]] || options+=(--allow-run-as-root)
  local term=${TERM:-dumb}
  [[ -t 1 ]] || term=dumb  # mpirun's ranks always see a terminal; plain lines for a log
  TERM=$term OMP_NUM_THREADS=$((threads > 0 ? threads : 1)) mpirun "${options[@]}" "$@" </dev/null
}
