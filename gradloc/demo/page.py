"""The commands for one's own model, as the report shows them. Runs none of them."""

COMMANDS = """\
# 1. Which layers react to what is new? Writes profile.json and profile.png.
gradloc trace --model openai-community/gpt2 \\
    --probes updated=changed.jsonl new=appeared.jsonl \\
    --reference old-text.txt --output profile.json

# 2. Train those layers on recent text. --policy scale is TGL + ALR, all is every layer.
gradloc train --model openai-community/gpt2 --corpus recent.jsonl \\
    --profile profile.json --policy freeze --max-steps 1000 --output run

# 3. What was learned, and what was forgotten? Compare with the same for the old model.
gradloc evaluate --model run/final \\
    --probes updated=changed.jsonl new=appeared.jsonl unchanged=same.jsonl \\
    --text old-text.txt --output scores.json"""
