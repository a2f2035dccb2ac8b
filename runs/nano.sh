#!/usr/bin/env bash
# GLM-nano from nothing: tokenizer, token shards, blank infilling, chat. About two hours on two cores.
#
#   CORPUS=folder SFT=folder runs/nano.sh
#
# CORPUS holds train-{en,zh}-*.jsonl.zst and val-{en,zh}.jsonl.zst (rows with "text"); SFT holds chat files (rows with
# "messages", see runs/nano_chat_data.py for the ones used). Results: out/nano/{pretrain,sft}, the model in out/nano/model.
# Every step continues where it was killed.
set -euo pipefail
cd "$(dirname "$0")/.."
CORPUS=${CORPUS:-../shared/data/corpus}
SFT=${SFT:-../shared/data/sft}
# glibc hands large buffers back to the system after every use and pays for it in page faults.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

mkdir -p out/nano
[ -f out/nano/tokenizer/tokenizer.json ] ||
    openglm tokenizer train "$CORPUS"/train-*.jsonl.zst --vocab-size 16384 --sample-bytes 10000000 --out out/nano/tokenizer
openglm data prepare "$CORPUS"/train-*.jsonl.zst --tokenizer out/nano/tokenizer --out out/nano/shards-train
for lang in en zh; do
    openglm data prepare "$CORPUS/val-$lang.jsonl.zst" --tokenizer out/nano/tokenizer --out "out/nano/shards-val-$lang"
done
[ -d out/nano/pretrain/model ] || openglm train runs/nano-pretrain.yaml
[ -f out/nano/chat.jsonl ] || python runs/nano_chat_data.py out/nano/chat.jsonl --sft "$SFT" \
    --val "$CORPUS/val-en.jsonl.zst" "$CORPUS/val-zh.jsonl.zst"
[ -d out/nano/sft/model ] || openglm train runs/nano-sft.yaml
python runs/nano_pack.py out/nano/sft/model out/nano/model
