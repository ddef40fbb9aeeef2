# Steps with limits, a log and one archive: what run_gpu.sh and check_gpu.sh have in common. Sourced, not run.
#
# Reads DRY (no limits where it is set) and RESULTS (a folder); sets status to 1 where a step failed or was stopped.

END=1000000 # of the steps, in seconds since the start
TABLE=()    # a line for each step
status=0

# step SECONDS NAME COMMAND...: run with a limit, log, go on whatever happens
step() {
  local limit=$1 name=$2 began=$SECONDS left=$((END - SECONDS)) code outcome pid shown
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  [ -n "$DRY" ] && limit=0 # no limit: what a dry run shows must not depend on how busy the machine is
  if [ -z "$DRY" ] && [ "$limit" -lt 5 ]; then
    TABLE+=("$(printf '%-32s %5s    %s' "$name" - "not begun: the time was used up")")
    status=1
    return
  fi
  echo "== $name (at most ${limit}s)" | tee -a "$LOG"
  shown=$(wc -l < "$LOG")
  # one interrupt, to the command alone: pytest then says what failed so far. What it leaves running is killed with its
  # group; a pipe would wait for such a process, so the output goes to the log first
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
    124 | 137) outcome="stopped after ${limit}s; what was measured is kept" ;;
    *) outcome="failed ($code)" ;;
  esac
  TABLE+=("$(printf '%-32s %4ss    %s' "$name" $((SECONDS - began)) "$outcome")")
  [ "$code" -eq 0 ] || status=1
  pack
}

# skip NAME REASON: a line of the table for a step that cannot run here
skip() {
  TABLE+=("$(printf '%-32s %5s    %s' "$1" - "left out: $2")")
}

pack() { :; }

# begin: open the log; where there is $OUT, results go to results.tar.gz in it alone, packed after each step
begin() {
  if [ -n "${OUT:-}" ]; then
    RESULTS=$(mktemp -d)
    mkdir -p "$OUT"
    pack() {
      local part="$OUT/.results.$BASHPID.part"
      tar -czf "$part" -C "$RESULTS" . 2> /dev/null || [ $? -eq 1 ] || return 0 # 1: a file changed while it was read
      mv "$part" "$OUT/results.tar.gz"
    }
    (while sleep 15; do pack; done) > /dev/null 2>&1 & # for the case that the script is killed during a step
    trap "kill $!; pack; rm -rf '$RESULTS'" EXIT
  fi
  mkdir -p "$RESULTS"
  LOG="$RESULTS/log.txt"
  : > "$LOG"
}

# outcomes: print the line of each step
outcomes() {
  printf '%s\n' "" "step                              time    outcome" "${TABLE[@]}" | tee -a "$LOG"
}
