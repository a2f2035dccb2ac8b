#!/usr/bin/env bash
# GLM-nano from nothing: tokenizer, token shards, blank infilling, chat. About four hours on two cores.
#
#   CORPUS=folder SFT=folder runs/nano.sh
#
# CORPUS holds train-{en,zh}-*.jsonl.zst and val-{en,zh}.jsonl.zst (rows with "text"); SFT holds chat files (rows with
# "messages", see runs/nano_chat_data.py for the ones used). Results: out/nano/{pretrain,pretrain2,chat}, the model in
# out/nano/model.
# Every step continues where it was killed. The second and third stage compile the model and need a C++ compiler
# (compile=false does without, a fifth slower).
set -euo pipefail
cd "$(dirname "$0")/.."
CORPUS=${CORPUS:-../shared/data/corpus}
SFT=${SFT:-../shared/data/sft}

mkdir -p out/nano
[ -f out/nano/tokenizer/tokenizer.json ] ||
    openglm tokenizer train "$CORPUS"/train-*.jsonl.zst --vocab-size 16384 --sample-bytes 10000000 \
        --out out/nano/tokenizer
openglm data prepare "$CORPUS"/train-*.jsonl.zst --tokenizer out/nano/tokenizer --out out/nano/shards-train
for lang in en zh; do
    openglm data prepare "$CORPUS/val-$lang.jsonl.zst" --tokenizer out/nano/tokenizer --out "out/nano/shards-val-$lang"
done
[ -d out/nano/pretrain/model ] || openglm train runs/nano-pretrain.yaml
[ -d out/nano/pretrain2/model ] || openglm train runs/nano-pretrain2.yaml
[ -f out/nano/chat.jsonl ] || python runs/nano_chat_data.py out/nano/chat.jsonl --sft "$SFT" \
    --val "$CORPUS/val-en.jsonl.zst" "$CORPUS/val-zh.jsonl.zst"
[ -d out/nano/chat/model ] || openglm train runs/nano-chat.yaml
python runs/nano_pack.py out/nano/chat/model out/nano/model
