"""Real checkpoints of the real DeepSpeed, with the truth gathered from the running engine.

recipes.py   which training runs, as data
models.py    the tiny models
truth.py     gathering every tensor from a running engine
worker.py    one rank: trains, saves, writes the truth
parallel.py  pipeline, experts, tensor parallel: refused, or read where the format says how
launch.py    forks the ranks of each world size
cache.py     makes everything once; `Case` and `Saved` say where it lies

FOLDER/<recipe>/checkpoint/         given to save_checkpoint: latest, <tag>/...
                truth-<n>/          of the n-th save: truth_fp32.safetensors,
                                    truth_module.safetensors, truth.json
                base/               the untrained model (llama, lora, tensor-parallel)
                export/             save_16bit_model (export-16bit)
                universal/          ds_to_universal (universal)
"""
