#!/usr/bin/env bash
# Evaluates the checkpoint of a workdir on several benchmarks, one after the other.
#
#   eval_all.sh --config configs/X.py --workdir DIR --out DIR [flag...] [-- --config.a.b=value...]
#
# By default every benchmark that has a file in --data: aime24, aime25, amc23, math500, gpqa_diamond (.jsonl).
# What each prints is kept in OUT/NAME.log, its graded responses in the folder OUT/NAME, and at the end one table of
# all is printed. A benchmark that fails does not keep the others from running; the same again goes on where this
# was interrupted. Relative paths begin at the root of this clone.
#   --data DIR              where the files are: data
#   --benchmark NAME=SOURCE   another source instead, as often as needed: aime24=tfds:aime24
#   --choice NAME=SOURCE    the same for multiple choice
#   --dry-run               print what would be run and run nothing
#
# From the environment: NGRPO_CONFIG, NGRPO_WORKDIR, NGRPO_PYTHON (.venv/bin/python of this clone).

# shellcheck source-path=SCRIPTDIR
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# add NAME=SOURCE KIND
add() {
  [[ $1 =~ ^[A-Za-z0-9_-]+=.+ ]] || die "$1 is not NAME=SOURCE"
  names+=("${1%%=*}") sources+=("${1#*=}") kinds+=("$2")
}

find_files() {
  local name
  for name in aime24 aime25 amc23 math500; do
    [[ ! -f $data/$name.jsonl ]] || add "$name=jsonl:$data/$name.jsonl" math
  done
  [[ ! -f $data/gpqa_diamond.jsonl ]] || add "gpqa_diamond=jsonl:$data/gpqa_diamond.jsonl" choice
  ((${#names[@]} > 0)) || die "no benchmark in $data; give its folder with --data, or --benchmark NAME=SOURCE"
}

# evaluate INDEX: one benchmark, shown and kept.
evaluate() {
  local command=("${evaluation[@]}" "--config=$NGRPO_CONFIG" "--workdir=$NGRPO_WORKDIR"
    "--generations=$out/${names[$1]}" "--config.data.eval=${sources[$1]}" "--config.data.prompt=${kinds[$1]}"
    "--config.reward.kind=${kinds[$1]}" "${REST[@]}")
  show "${command[@]}"
  [[ $DRY_RUN == false ]] || return 0
  "${command[@]}" </dev/null 2>&1 | tee "$out/${names[$1]}.log"
}

split_flags "$@"
set -- "${ARGS[@]}"
names=() sources=() kinds=() failed=() finished=()
data=data out=""
while (($#)); do
  case $1 in
    --help | -h) show_help ;;
    --dry-run) DRY_RUN=true && shift && continue ;;
    --config | --workdir | --data | --out | --benchmark | --choice) need_value "$@" ;;
    *) unknown_flag "$1" ;;
  esac
  case $1 in
    --config) NGRPO_CONFIG=$2 ;;
    --workdir) NGRPO_WORKDIR=$2 ;;
    --data) data=$2 ;;
    --out) out=$2 ;;
    --benchmark) add "$2" math ;;
    --choice) add "$2" choice ;;
  esac
  shift 2
done
require NGRPO_CONFIG --config
require NGRPO_WORKDIR --workdir
[[ -n $out ]] || die "--out is not given: the folder for what the benchmarks print"
cd "$REPO"
((${#names[@]} > 0)) || find_files
evaluation=("${NGRPO_PYTHON:-$REPO/.venv/bin/python}" -m ngrpo_jax.evaluate)
[[ $DRY_RUN == true ]] || mkdir -p "$out"

for index in "${!names[@]}"; do
  note "== ${names[index]}"
  if evaluate "$index"; then finished+=("$out/${names[index]}"); else failed+=("${names[index]}"); fi
done
((${#finished[@]} < 2)) || run "${evaluation[@]}" --from "${finished[@]}" || failed+=("the table of all")
((${#failed[@]} == 0)) || { note "error: failed: ${failed[*]}; see the logs in $out" && exit 1; }
