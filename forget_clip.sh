#!/bin/sh
# Forget classes of CLIP: a run of train.py for every data set, seed, backbone and method.
set -uf
newline='
'

usage='usage: sh forget_clip.sh ATTEMPT SEED DATASETS ARCH MULTICLASS [options of train.py]
  ATTEMPT     results go to results/resultsATTEMPT/seed_SEED, or where there are several of ARCH or
              TRAINER to resultsATTEMPT/ARCH/TRAINER/seed_SEED, of the two those that are several;
              letters, digits, "_", "-", "."
  SEED        0 or more; several with commas: 0,1,2. ForgetExact gives the same for every seed
  DATASETS    StanfordDogs, StanfordCars, Caltech101, OxfordFlowers, Mini..., others of DATASETS.md;
              several with commas; with IMAGES a name of your own
  ARCH        RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/16, ViT-B/32, ViT-L/14, ViT-L/14@336px,
              mini, open_clip:NAME[/PRETRAINED] or hf:DIR, a local folder; several with commas;
              with --weights of your own also RN50-quickgelu, ViT-B/32-gelu and the like
  MULTICLASS  0: each class of forget_cls.py alone; 1: all of a set at once
  options     --forget NAME, --overwrite, --audit, --weights PATH, --quiet,
              --precision bf16, --log tensorboard, KEY VALUE, ... (docs/settings.md)
environment:
  DATA      folder of the image sets (default: data)
  FEATURES  folder of feature bundles; then neither model nor images are needed
  IMAGES    images of your own: a folder with a folder per class, or a CSV of path and class
  OUT       folder of the results (default: results)
  CACHE     folder for weights and encoded features (default: cache)
  TRAINER   ForgetLoRA (default, the paper), ForgetOptimum (its objective at the proved optimum),
            ForgetExact (complete forgetting), or another that python train.py --help lists; several
            with commas: ForgetExact,ForgetLoRA
  LAUNCHER  local (default): one run after the other; ray: python -m experiments sweep spreads them
            over this machine, or over the cluster of RAY_ADDRESS (docs/scale.md)
  PYTHON    default: .venv/bin/python, else python3
example, without a download: TRAINER=ForgetExact sh forget_clip.sh exact 0 MiniDigits mini 0'

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

case ${1-} in -h | --help) printf '%s\n' "$usage"; exit 0 ;; esac
[ $# -ge 5 ] || die "five arguments are needed (ATTEMPT SEED DATASETS ARCH MULTICLASS), got $#; sh forget_clip.sh --help"
attempt=$1 multiclass=$5
case $attempt in '' | .* | *[!A-Za-z0-9_.-]*) die "ATTEMPT must be letters, digits, '_', '-' or '.', got '$attempt'" ;; esac
case $multiclass in 0) flag= ;; 1) flag=--multiclass ;; *) die "MULTICLASS must be 0 or 1, got '$multiclass'" ;; esac
# The names of a list between commas, one per line, each once.
listed() {
    case $(printf '%s' "$2" | tr -d ' ') in '' | *,,* | ,* | *,) die "$1 with commas between them, got '$2'" ;; esac
    printf '%s' "$2" | tr , '\n' | sed 's/^ *//; s/ *$//' | awk '!seen[$0]++'
}
seeds=$(listed "SEED must be integers" "$2") || exit 2
seeds=$(printf '%s\n' "$seeds" | sed 's/^0*\([0-9]\)/\1/' | awk '!seen[$0]++')
datasets=$(listed "DATASETS must be names" "$3") || exit 2
archs=$(listed "ARCH must be names" "$4") || exit 2
trainers=$(listed "TRAINER must be names" "${TRAINER:-ForgetLoRA}") || exit 2
case $seeds in *[!0-9"$newline"]*) die "SEED must be an integer of 0 or more, got '$2'" ;; esac
case ${IMAGES:+$datasets} in *"$newline"*) die "IMAGES is one data set, and DATASETS names several: '$3'" ;; esac
shift 5
show=printf
for option in "$@"; do
    case $option in
        --quiet) show=: ;;
        --dataset | --dataset=* | --seed | --seed=* | --backbone | --backbone=* | --trainer | --trainer=* | \
        --output-dir | --output-dir=* | --multiclass | --multiclass=* | \
        DATASET.NAME | SEED | MODEL.BACKBONE.NAME | TRAINER.NAME | OUTPUT_DIR | FORGET.MULTICLASS)
            die "${option%%=*} is set for each run by the five arguments, TRAINER and OUT; leave it out" ;;
    esac
done

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 2
if [ -z "${PYTHON-}" ]; then
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
command -v "$PYTHON" >/dev/null 2>&1 || die "no Python at '$PYTHON'; run 'make venv' or set PYTHON"
out=${OUT:-$here/results}/results$attempt
set -- --root "${DATA:-$here/data}" ${IMAGES:+--images "$IMAGES"} --features "${FEATURES-}" \
    --cache "${CACHE:-$here/cache}" $flag "$@"

commas() { printf '%s' "$1" | tr '\n' ,; }
case ${LAUNCHER:-local} in
    local) ;;
    ray)
        PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m experiments sweep \
            --datasets "$(commas "$datasets")" --seeds "$(commas "$seeds")" --backbones "$(commas "$archs")" \
            --trainers "$(commas "$trainers")" --out "$out" --launcher ray "$@" ;;
    *) die "LAUNCHER must be local or ray, got '$LAUNCHER'" ;;
esac

IFS=$newline
failed=
for arch in $archs; do
    for trainer in $trainers; do
        folder=$out
        case $archs in *"$newline"*) folder=$folder/$(printf '%s' "$arch" | tr / -) ;; esac
        case $trainers in *"$newline"*) folder=$folder/$trainer ;; esac
        for seed in $seeds; do
            for dataset in $datasets; do
                $show '== %s, %s, %s, seed %s\n' "$dataset" "$arch" "$trainer" "$seed"
                "$PYTHON" "$here/train.py" --dataset "$dataset" --seed "$seed" --backbone "$arch" \
                    --trainer "$trainer" --output-dir "$folder/seed_$seed" "$@"
                status=$?
                case $status in 130 | 143) exit $status ;; esac
                [ $status = 0 ] || failed="$failed${failed:+; }$dataset, $arch, $trainer, seed $seed"
            done
        done
    done
done
[ -z "$failed" ] || die "failed: $failed; see the messages above"
