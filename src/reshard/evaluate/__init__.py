"""Running a converted model: answers, speed, health, and whether it is the model it should be.

The only room that needs torch and transformers. `options` and `report` import neither, so that
`reshard --help` stays fast; the rest is imported when a model is run.

run            one run, in stages (stage); events go to the caller (progress)
folder         the model folder: its config and weight files; places: where the report goes
loading        the model, its tokenizer and processor; device: where it runs
encoding       from a prompt to tensors; media: images and sound; texts: the built-in prompts
generation     answers, one prompt at a time; streaming: their text; chat: a conversation
timing         the benchmark; memory: peak memory
scoring        models that do not generate; reward: scalar reward models
health         findings that need no reference; scan: the weights; repetition: the answers
judging        `--compare`; compare, divergence, weights: what differs; verdict: the thresholds
report         its types; schema: as JSON schema; page, plots: as a web page; terminal
"""
