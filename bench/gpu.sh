#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes on an H100: bench/gpu.sh [FOLDER]; prints one table at its end.
# FOLDER (default: $OUT, else bench/results/gpu) gets the figures as JSON and what the commands said. Nothing is
# downloaded. PYTHON names the interpreter; SECONDS_FOR_TOYBIRDS=0 leaves the trainings out. What does not fit into
# LIMIT seconds (default 580) is cut off or left out, and the table says so.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-${OUT:-bench/results/gpu}}
birds=${SECONDS_FOR_TOYBIRDS:-60}
limit=${LIMIT:-580}
mkdir -p "$out"
if ! "$python" -c "import torch, torchvision, easydict, scipy, tqdm, yaml; assert torch.cuda.is_available()"; then
    echo "error: $python lacks a package above, or sees no GPU; PYTHON=... names another" >&2
    exit 2
fi

within() { # seconds at most, but no more than are left: a time limit for `timeout`
    local left=$((limit - SECONDS))
    echo $((left < 1 ? 1 : $1 < left ? $1 : left))
}

measure() { # name, seconds at most, module and its options
    local name=$1 most=$2
    shift 2
    echo "== $name: $*"
    timeout "$(within "$most")" "$python" -m "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1 || echo "   failed or took too long: $out/$name.log"
}

step() { # name, seconds at most, settings
    local name=$1 most=$2
    shift 2
    local set=()
    for pair in "$@"; do set+=(--set "TRAIN.${pair%%=*}" "${pair#*=}"); done
    measure "step-$name" "$most" bench.train_step --image-size 256 --nf 64 --batch-size 24 --encoder inception --reference \
        --rounds 5 --warm-up 3 "${set[@]}"
}

step tf32 60 PRECISION=tf32
step bf16-channels-last 60 PRECISION=bf16 CHANNELS_LAST=True
step bf16-channels-last-compiled 200 PRECISION=bf16 CHANNELS_LAST=True COMPILE=True
step bf16 60 PRECISION=bf16
step fp32 60 PRECISION=fp32
step bf16-checkpointing 60 PRECISION=bf16 CHANNELS_LAST=True ACTIVATION_CHECKPOINTING=True
measure losses 30 bench.losses --image-size 256 --nf 64
measure data 40 bench.data --rounds 5
measure data-workers 70 bench.data --rounds 3 --images 480 --workers "$(nproc)"
measure sample 40 bench.sample --image-size 256 --nf 64 --images 1024 --batch-size 64 --rounds 2

if [ "$birds" -gt 0 ]; then
    data=$out/toybirds-data
    {
        timeout "$(within 60)" "$python" -m datasets.prepare toybirds --root "$data" --image-size 64 &&
            timeout "$(within 60)" "$python" pretrain_DAMSM.py --cfg cfg/DAMSM/demo.yml --gpu 0 --out "$out/encoders" --set DATA_DIR "$data" TRAIN.MAX_EPOCH 4
    } >"$out/toybirds.log" 2>&1 || echo "   no encoders: $out/toybirds.log"
    for precision in fp32 bf16; do
        echo "== ToyBirds in $precision"
        {
            timeout --signal TERM "$(within "$birds")" "$python" main.py --cfg cfg/demo.yml --gpu 0 --set DATA_DIR "$data" \
                TEXT.DAMSM_NAME "$out/encoders/best.pth" OUTPUT_DIR "$out/$precision" TRAIN.PRECISION "$precision" TRAIN.MAX_STEPS 800 \
                GAN.PROJECTED.JOINS 0 TRAIN.FINETUNE_ENCODERS True
            timeout "$(within 90)" "$python" eval/attributes.py --checkpoint "$out/$precision"/*/checkpoints/last.pth \
                --cache-dir "$out/toybirds" --json "$out/attributes-$precision.json"
        } >"$out/toybirds-$precision.log" 2>&1 || echo "   failed: $out/toybirds-$precision.log"
    done
    rm -rf "$data"
fi
"$python" -m bench.gpu_table "$out" | tee "$out/table.md"
