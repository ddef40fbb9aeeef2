# Functions of run_gpu.sh and check_gpu.sh, which source this file: steps with time limits, a log, and an archive.
#
# They read DRY (if it is set, there are no limits) and RESULTS (a folder), and set status to 1 if a step fails or is
# stopped.

END=1000000 # time at which the last step must end, in seconds since the start of the script
TABLE=()    # one line per step
status=0

# step SECONDS NAME COMMAND...: run a command with a limit, log its output, and continue if it fails
step() {
  local limit=$1 name=$2 began=$SECONDS left=$((END - SECONDS)) code outcome pid shown
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  [ -n "$DRY" ] && limit=0 # a dry run must not depend on the load of the machine
  if [ -z "$DRY" ] && [ "$limit" -lt 5 ]; then
    TABLE+=("$(printf '%-32s %5s    %s' "$name" - "not started: no time left")")
    status=1
    return
  fi
  echo "== $name (at most ${limit}s)" | tee -a "$LOG"
  shown=$(wc -l < "$LOG")
  # At the limit, only the command gets an interrupt, so that pytest still prints its failures. Processes that the
  # command leaves behind are killed with its process group. The output goes to the log and is printed afterwards,
  # because a pipe would wait for these processes.
  set -m
  timeout --foreground --signal=INT --kill-after=15 "$limit" "$@" >> "$LOG" 2>&1 < /dev/null &
  pid=$!
  set +m
  wait "$pid"
  code=$?
  kill -KILL -- "-$pid" 2> /dev/null
  tail -n "+$((shown + 1))" "$LOG"
  case $code in
    0) outcome=done ;;
    124 | 137) outcome="stopped after ${limit}s; results so far are kept" ;;
    *) outcome="failed ($code)" ;;
  esac
  TABLE+=("$(printf '%-32s %4ss    %s' "$name" $((SECONDS - began)) "$outcome")")
  [ "$code" -eq 0 ] || status=1
  pack
}

# skip NAME REASON: add a line to the table for a step that cannot run here
skip() {
  TABLE+=("$(printf '%-32s %5s    %s' "$1" - "skipped: $2")")
}

pack() { :; }

# begin: open the log. If $OUT is set, results go only to results.tar.gz in it, which is updated after each step.
begin() {
  if [ -n "${OUT:-}" ]; then
    RESULTS=$(mktemp -d)
    mkdir -p "$OUT"
    pack() {
      local part="$OUT/.results.$BASHPID.part"
      tar -czf "$part" -C "$RESULTS" . 2> /dev/null || [ $? -eq 1 ] || return 0 # 1: a file changed while tar read it
      mv "$part" "$OUT/results.tar.gz"
    }
    (while sleep 15; do pack; done) > /dev/null 2>&1 & # keeps the results if the script is killed during a step
    trap "kill $!; pack; rm -rf '$RESULTS'" EXIT
  fi
  mkdir -p "$RESULTS"
  LOG="$RESULTS/log.txt"
  : > "$LOG"
}

# outcomes: print the table of steps
outcomes() {
  printf '%s\n' "" "step                              time    outcome" "${TABLE[@]}" | tee -a "$LOG"
}
