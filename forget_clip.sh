#!/bin/sh
# Forget classes of CLIP: a run of train.py for every data set, seed, backbone and method.
set -uf

usage='usage: sh forget_clip.sh ATTEMPT SEED DATASETS ARCH MULTICLASS [options of train.py]
  ATTEMPT     results go to results/resultsATTEMPT/seed_SEED, or where there are several of ARCH or
              TRAINER to resultsATTEMPT/ARCH/TRAINER/seed_SEED, of the two those that are several;
              letters, digits, "_", "-", "."
  SEED        0 or more; several with commas: 0,1,2
  DATASETS    StanfordDogs, StanfordCars, Caltech101, OxfordFlowers, Mini..., others of DATASETS.md;
              several with commas; with IMAGES a name of your own
  ARCH        RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/16, ViT-B/32, ViT-L/14, ViT-L/14@336px,
              mini, open_clip:NAME[/PRETRAINED] or hf:DIR, a local folder; several with commas;
              with --weights of your own also RN50-quickgelu, ViT-B/32-gelu and the like
  MULTICLASS  0: each class of forget_cls.py alone; 1: all of a set at once
  options     --forget NAME, --overwrite, --audit, --save-model, --weights PATH, --quiet,
              --precision bf16, --log tensorboard, KEY VALUE, ...
environment:
  DATA      folder of the image sets (default: data)
  FEATURES  folder of feature bundles; then neither model nor images are needed
  IMAGES    images of your own: a folder with a folder a class, or a CSV of path and class
  OUT       folder of the results (default: results)
  CACHE     folder for weights and encoded features (default: cache)
  TRAINER   ForgetLoRA (default, the paper), ForgetOptimum (its objective at the proved optimum),
            ForgetExact (complete forgetting), or a baseline: ForgetNothing, ForgetName, ForgetZero,
            ForgetNoise, ForgetNullSpace, ForgetUCE, ForgetLEACE, ForgetAscent;
            several with commas: ForgetExact,ForgetLoRA
  LAUNCHER  local (default): one run after the other; ray: spread by Ray over this machine, or over
            the cluster of RAY_ADDRESS (docs/scale.md)
  PYTHON    default: .venv/bin/python, else python3
example: sh forget_clip.sh 1 0 "StanfordDogs,Caltech101" RN50 0'

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

case ${1-} in -h | --help) printf '%s\n' "$usage"; exit 0 ;; esac
[ $# -ge 5 ] || die "five arguments are needed (ATTEMPT SEED DATASETS ARCH MULTICLASS), got $#; sh forget_clip.sh --help"
attempt=$1 seeds=$2 datasets=$3 named=$3 archs=$4 multiclass=$5
shift 5

case $attempt in '' | .* | *[!A-Za-z0-9_.-]*) die "ATTEMPT must be letters, digits, '_', '-' or '.', got '$attempt'" ;; esac
listed() {
    case $(printf '%s' "$2" | tr -d ' ') in '' | *,,* | ,* | *,) die "$1 with commas between them, got '$2'" ;; esac
}
listed "DATASETS must be names" "$datasets"
listed "SEED must be integers" "$seeds"
listed "ARCH must be names" "$archs"
listed "TRAINER must be names" "${TRAINER:=ForgetLoRA}"
case $multiclass in
    0) flag= ;;
    1) flag=--multiclass ;;
    *) die "MULTICLASS must be 0 or 1, got '$multiclass'" ;;
esac
# Each once, and a seed without zeros in front: 00 and 0 are one.
names() { printf '%s' "$1" | tr ', ' '\n\n' | sed "$2" | awk 'NF && !seen[$0]++' | paste -s -d , -; }
seeds=$(names "$seeds" 's/^0*\([0-9]\)/\1/')
datasets=$(names "$datasets" "")
if [ -n "${IMAGES-}" ]; then
    case $datasets in *,*) die "IMAGES is one data set, and DATASETS names several: '$named'" ;; esac
fi
for seed in $(printf '%s' "$seeds" | tr , ' '); do
    case $seed in '' | *[!0-9]*) die "SEED must be an integer of 0 or more, got '$seed'" ;; esac
done

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 2
if [ -z "${PYTHON-}" ]; then
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
command -v "$PYTHON" >/dev/null 2>&1 || die "no Python at '$PYTHON'; run 'make venv' or set PYTHON"

exec "$PYTHON" "$here/train.py" \
    --datasets "$datasets" --seeds "$seeds" --backbones "$archs" --trainers "$TRAINER" \
    --output-dir "${OUT:-$here/results}/results$attempt" \
    --root "${DATA:-$here/data}" ${IMAGES:+--images "$IMAGES"} --features "${FEATURES-}" --cache "${CACHE:-$here/cache}" \
    $flag LAUNCHER.NAME "${LAUNCHER:-local}" "$@"
