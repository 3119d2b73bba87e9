#!/usr/bin/env bash
# The published figures, from their commands. Those on recorded pools need POOLS, a folder with the files that docs/frontier.md names.
set -euo pipefail
cd "$(dirname "$0")/.."
ttc=.venv/bin/ttc
$ttc demo
for model in nano-xs nano-s nano-m nano-l; do .venv/bin/python -m ttc.rl.evaluate --model $model; done
.venv/bin/python -m ttc.rl.family
.venv/bin/python -m ttc.rl.family --speed
.venv/bin/python -m ttc.rl.figures
$ttc bench overhead -m nano-xs --problems 12 --rounds 12
$ttc bench overhead -m nano-xs --problems 12 --rounds 12 --http
$ttc bench steering --rounds 9 --tokens 256
$ttc bench study deepening --out runs/deepening.jsonl
$ttc bench study anytime --out runs/anytime.jsonl
$ttc bench study forcing --thinking 400 --out runs/forcing.jsonl
$ttc bench study search --thinking 192 --out runs/search.jsonl # an hour of one core and more; it goes on from its file
$ttc bench policies --problems 200 --seeds 3 -p adaptive -p 'adaptive?price=0.01' -p 'adaptive-consistency?n=8' -p 'self-consistency?n=8' \
  -p 'best-of-n?n=4&score=self-certainty' --json
$ttc bench cost
.venv/bin/python -m ttc.costmodel.intervals_study
for context in 4096 16384 32768; do $ttc bench decode --contexts $context --batches 1,8,32 --memory 9; done
$ttc bench fidelity -m nano-m -t "rg:chain_sum?min_terms=16&max_terms=24&min_digits=1&max_digits=1" --problems 60 --samples 4 \
  --budgets 128,256,512 --thinking 1536 --caps 512
pools=${POOLS:-../shared/pools}
if [ -d "$pools" ]; then
  .venv/bin/python -m ttc.simulate fit "$pools/qwen3-8b_aime24.json" "$pools/qwen3-8b_aime25.json" --shuffles 40 --out runs/policies
  .venv/bin/python -m ttc.simulate budgets "$pools/qwen3-8b_aime24.json" "$pools/qwen3-8b_aime25.json" --out runs/policies
  cp runs/policies/policies.png docs/policies.png
  for pool in "$pools"/qwen3-8b_aime2?.json; do
    $ttc simulate --pool "$pool" --policy 'adaptive?width=24&price=0&early=1'
    $ttc simulate --pool "$pool" --policy parallel-probe --free-probes
  done
  for task in aime24 aime25; do
    $ttc frontier "$pools/accuracy_vs_tokens.json" "$pools/accuracy_vs_kv_budget.json" "$pools/qwen3-8b_$task.json" \
      --task $task --allocate 1e16 --allocate 1e17 --plot runs/frontier_$task.png
  done
  $ttc plan --budget "40 TeFLOPs" -m Qwen3-4B -m Qwen3-8B -m Qwen3-14B --task aime24 --data "$pools/accuracy_vs_tokens.json" \
    --data "$pools/accuracy_vs_kv_budget.json" --data "$pools/qwen3-8b_aime24.json"
else
  echo "no pools in $pools: the tables of docs/policies.md and docs/frontier.md are left out (set POOLS)"
fi
