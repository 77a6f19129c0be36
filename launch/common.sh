# common.sh: what the scripts of launch/ share. Sourced, not run; leaves the caller in the
# repository root, with strict error handling.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=mpirun.sh
source launch/mpirun.sh
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

# on_ranks N COMMAND...: runs the command on N ranks of this machine, which share its cores.
on_ranks() {
  local ranks=$1 term=${TERM:-dumb}
  local -a options
  shift
  mpirun_options "$ranks"
  [[ -t 1 ]] || term=dumb  # ranks always see a terminal; plain lines for a log
  TERM=$term OMP_NUM_THREADS=$(threads_for "$ranks") mpirun "${options[@]}" "$@" </dev/null
}
