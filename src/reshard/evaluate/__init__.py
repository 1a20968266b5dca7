"""Running a converted model: answers, speed, health, and whether it is the model it should be.

The only room that needs torch and transformers. `command` (the words of the command line),
`options` and `report` import neither, so that `reshard --help` stays fast; the rest is imported
when a model is run.
"""
