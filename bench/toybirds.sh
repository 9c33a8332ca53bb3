#!/bin/sh
# Train one system on ToyBirds for a given CPU time, and go on where it was if it ran before:
#   bench/toybirds.sh NAME MINUTES CFG [main.py options], e.g. bench/toybirds.sh ssa 22 cfg/toybirds_ssa.yml
# One thread, on the CPU; the run directories go to output/toybirds/NAME. Needs the data and the encoders:
#   python -m datasets.prepare toybirds --image-size 64; python pretrain_DAMSM.py --cfg cfg/DAMSM/toybirds.yml --gpu -1
set -eu
name=$1 minutes=$2 cfg=$3
shift 3
out=output/toybirds/$name
mkdir -p "$out"
spent=$(cat "$out/cpu_seconds" 2>/dev/null || echo 0)
OMP_NUM_THREADS=1 python main.py --cfg "$cfg" --gpu -1 --continue "$@" --set OUTPUT_DIR "$out" &
pid=$!
ticks=$(getconf CLK_TCK)
used=0
while sleep 5 && [ -r "/proc/$pid/stat" ]; do
    # Fields 14 and 15: CPU time in user and kernel mode; the name in field 2 has no space in it.
    used=$(awk -v ticks="$ticks" '{ printf "%d", ($14 + $15) / ticks }' "/proc/$pid/stat" 2>/dev/null || echo "$used")
    if [ $((spent + used)) -ge $((minutes * 60)) ]; then
        kill -TERM "$pid" 2>/dev/null || true
        break
    fi
done
wait "$pid" || [ $? -eq 143 ]
echo $((spent + used)) > "$out/cpu_seconds"
echo "$name: $((spent + used)) s of CPU time in $out"
