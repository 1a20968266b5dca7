"""What becomes of each hint: the scenarios that follow it, or the reason why none here does.

`SCENARIOS` register their cases by the hints that they follow. `ELSEWHERE` are hints that another
test raises and follows, or whose intact input another test converts; `WITHOUT` those that no test
can follow, each with the reason. A hint of the sources that stands in none of them fails
`test_inventory`, and so does a line here without a hint.
"""

from __future__ import annotations

from tests.hints import ailments, damaged, fits, flags, folders

SCENARIOS = (ailments, damaged, fits, flags, folders)

_TRAINING = "it is followed in the training run, which saves otherwise: "
_PIECE = "no hint by itself: the text is put together from others, which stand here"
_OTHER = "it needs another machine or package: "
_STATED = "each finding of this code states a fix of its own, which stands here"
_MEGATRON = "Megatron-Core: its makers train with Megatron, and no small one is at hand here"
_CACHE = "it needs a cache in the user's home; what it names is followed by hints of its own"
_LATE = "no small input is made here that leads to it"
_UNSEEN = "what is done outside leaves nothing to run: "

#: Hint -> the test, `file::function` below `tests/`.
# ruff: noqa: E501
ELSEWHERE: dict[str, str] = {
    "For the layout of the release, pass --names hub.": "models/test_released_layout.py::test_a_base_in_another_layout",
    "Write the version into the base's config.json, as transformers_version.": "models/test_released_layout.py::test_an_orientation_that_nothing_tells",
    "To write them: reshard doctor OUT --repair REPAIRED.": "models/test_released_layout.py::test_fields_that_the_base_lacks_are_said",
    "Pass --to hf, or leave out --names.": "models/test_released_layout.py::test_dcp_has_no_released_layout",
    "Write it in the layout of the release: reshard convert DIR OUT --names hub.": "doctor/test_engines.py::test_names_of_a_live_module",
    "Move them into a folder below, or away.": "doctor/test_engines.py::test_a_head_file_without_an_index",
    " Or convert the run again: reshard writes an index, which keeps them apart.": "doctor/test_engines.py::test_a_head_file_without_an_index",
    "Make the 16-bit model: reshard convert DIR OUT.": "doctor/test_engines.py::test_codes_that_mlx_does_not_read",
    "Leave out --masters.": "megatron/test_masters.py::test_without_masters_to_read",
    "Leave out --masters; or load the checkpoint into the run, and save it with --dist-ckpt-optim-fully-reshardable.": "megatron/test_masters.py::test_without_masters_to_read",
    "The model lies in {}{}: name that folder.": "megatron/test_refusals.py::test_hints_that_name_a_folder",
    "Name the one to read.": "megatron/test_refusals.py::test_hints_that_name_a_folder",
    "Use an earlier checkpoint, or copy the folder again if the file was left behind.": "megatron/test_refusals.py::test_hints_that_name_a_folder",
    "Pass --base, the model as it was released, whose names they then get.": "megatron/test_into.py::test_tensors_without_a_place",
    "Is it the whole model? What it lacks is taken from another by --base MODEL --fill-from-base.": "megatron/test_into.py::test_a_model_that_lacks_tensors",
    "Is the config that of this model?": "megatron/test_into.py::test_shapes_that_are_not_the_configs",
    "Leave out --names.": "megatron/test_into.py::test_names_are_the_trainers",
    "Change into a folder that exists, or name the whole path.": "test_door.py::test_the_current_folder_is_gone",
    "Copy the folder again, from where it was saved.": "fsdp/test_refusals.py::test_one_ranks_file_over_anothers",
    "The metadata is damaged, or the save did not finish.": "fsdp/test_refusals.py::test_chunk_without_a_place",
    "Save again with use_collectives=True, or move the files of the other ranks away.": "fsdp/test_refusals.py::test_replicas_that_differ",
    "Install the extra, in reshard's folder: pip install '.[html]'.": "pages/test_changes.py::test_a_page_needs_jinja2",
    "Load it with the extension that wrote it and save it again without.": "fsdp/test_refusals.py::test_unknown_transform",
    "The folder holds files of different saves.": "fsdp/test_refusals.py::test_writers_of_different_saves",
    "It holds shards of different saves; keep those of one.": "fsdp/test_refusals.py::test_shards_of_different_saves",
    "The metadata is damaged; copy it again, or use another checkpoint.": "fsdp/test_refusals.py::test_tables_of_the_metadata_that_contradict_each_other",
    "It was not written by torch.distributed.checkpoint.": "fsdp/test_refusals.py::test_item_that_is_no_tensor",
    "The file is damaged or was made to mislead.": "fsdp/test_refusals.py::test_zstd_frame_that_swells",
    "A rank's part is missing.": "fsdp/test_refusals.py::test_hole",
    "Copy the whole folder again.": "fsdp/test_refusals.py::test_writers_without_collectives",
    "Copy the file again or use another checkpoint.": "fsdp/test_refusals.py::test_damaged_zstd_frame",
    "Install the extra, in reshard's folder: pip install '.[zstd]'.": "fsdp/test_refusals.py::test_without_zstandard",
    "For such a run, convert with --names memory --transformers-version {}, or whichever version the run has.": "models/test_every_name.py::test_a_layout_that_stacks_is_a_finding_whose_fix_works",
    "Copy the model again.": "quantised/test_doctor.py::test_a_code_without_its_scale",
    "Convert the quantised release again: reshard convert FP8MODEL OUT.": "quantised/test_doctor.py::test_scales_beside_weights_that_are_no_codes",
    "To compare them, examine the unquantised model.": "quantised/test_refused.py::test_doctor_says_so",
    "Copy the config of the model that it was made from.": "quantised/test_refused.py::test_doctor_says_so",
    "Convert the run's checkpoint again: reshard convert RUN OUT.": "doctor/test_command.py::test_the_mended_folder_must_be_well",
    "Try --device cpu.": "evaluate/test_broken.py::test_a_device_that_is_not_there",
    "Merge it: reshard convert SRC DST --base BASE --fill-from-base.": "models/test_adapters.py::test_an_adapter_folder_is_called_one_where_a_model_is_asked_for",
    "A training checkpoint is converted first: reshard convert SRC DST --base BASE.": "evaluate/test_broken.py::test_a_training_checkpoint_is_told_from_a_model",
    "Set `architectures` to the class that was trained, such as Qwen2ForCausalLM.": "evaluate/test_broken.py::test_a_bare_backbone_is_refused",
    "Copy the missing files, or convert again.": "evaluate/test_broken.py::test_a_shard_is_missing",
    "The config is that of another model.": "evaluate/test_broken.py::test_the_config_is_another_models",
    "Read that code, then allow it with --trust-remote-code.": "evaluate/test_broken.py::test_remote_code_runs_only_when_it_is_trusted",
    "Name another file with --html.": "evaluate/test_command.py::test_a_file_that_is_not_a_report_is_never_replaced",
    "Name a file with --html.": "pages/test_changes.py::test_a_file_that_is_no_page_is_never_replaced",
    "Name another file with --output-file.": "evaluate/test_command.py::test_reports_of_other_models_stay",
    "Copy it again, or convert again.": "evaluate/test_broken.py::test_a_file_is_cut_short",
    "Copy the files of every rank and expert.": "deepspeed/test_experts.py::test_a_missing_expert_is_named",
    "Copy every rank's files.": "deepspeed/test_tensor_parallel.py::test_missing_files_are_named",
    "Load and save it once with AutoTP of DeepSpeed 0.19.8, or export it with the framework that trained it.": "deepspeed/test_tensor_parallel.py::test_without_the_metadata_it_is_refused",
    "Convert the checkpoint that it was made from.": "deepspeed/test_universal.py::test_made_from_other_parallelism_it_is_refused",
    "Pass {}, or leave out --optimizer.": "state/test_writing.py::test_options_that_do_not_go_together",
    "Pass --names memory, or leave out --names.": "state/test_writing.py::test_options_that_do_not_go_together",
    "Pass --optimizer, or leave out --{}.": "state/test_writing.py::test_options_that_do_not_go_together",
    "Leave out --hyperparameters.": "state/test_writing.py::test_hyperparameters_that_the_checkpoint_states",
    "Leave out --base: without it the names stay, and the state travels with them.": "state/test_writing.py::test_a_base_whose_names_the_moments_do_not_fit",
    "Pass --consumed-samples.": "state/test_writing.py::test_the_samples_that_a_run_consumed_can_be_given",
    "Leave out --dtype.": "state/test_writing.py::test_masters_that_are_rounded_are_a_finding",
    'Write a list with an object for each group: [{"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}].': "state/test_writing.py::test_hyperparameters_that_are_none",
    'Pass --hyperparameters with a JSON file of them, a list with an object for each group: [{"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}].': "state/test_writing.py::test_hyperparameters_that_no_file_holds_are_asked_for",
    "Convert the weights alone, without --optimizer.": "state/test_refusals.py::test_eight_bit_moments",
    "Convert the weights alone, without --optimizer; or save once without --use_mp_opt.": "state/test_refusals.py::test_one_optimizer_file_a_rank",
    "Save it with get_optimizer_state_dict, or convert the weights alone.": "state/test_refusals.py::test_numbers_for_names",
    "The file is damaged, or of an optimizer that is not handled.": "state/test_refusals.py::test_groups_that_do_not_cover_the_parameters",
    "Resume the run once with ZeRO stage 1 and save, or convert the weights alone.": "state/test_refusals.py::test_without_zero_groups_in_no_order_of_the_model",
    "Make the universal checkpoint again.": "deepspeed/test_universal.py::test_masters_of_another_save",
    "Copy the whole folder, or make the universal checkpoint again.": "deepspeed/test_universal.py::test_a_missing_master_is_named",
    "Use another save; or, if this file is the newer, move the *_optim_states.pt files away: it holds all weights.": "deepspeed/test_refusals.py::test_a_tag_that_was_saved_again_in_another_stage",
    "The files are of different runs or ranks were renamed.": "deepspeed/test_refusals.py::test_two_ranks_are_exchanged",
    "Or convert the model that was exported beside it: name its file.": "test_locate.py::test_of_an_incomplete_checkpoint_with_its_export_the_error_names_that",
    "Save without offloading to the CPU, or with SHARDED_STATE_DICT.": "ranks/test_refusals.py::test_slices_that_were_copied_off_their_flat_parameter",
    "Take it from the base: --fill-from-base.": "naming/test_fit.py::test_a_head_stays_behind_an_embedding_that_was_trained_apart",
    "The base's has shape {}: save the head too, with the whole model.": "naming/test_fit.py::test_a_head_stays_behind_an_embedding_that_was_trained_apart",
    "Load the checkpoint into the training run and save it with SHARDED_STATE_DICT.": "ranks/test_read.py::test_flattened_tensors_need_a_base_that_fits",
    "Pass --base, the model that the training started from.": "ranks/test_read.py::test_flattened_tensors_need_a_base_that_fits",
    "Name the base that the training started from.": "ranks/test_read.py::test_flattened_tensors_need_a_base_that_fits",
    "PEFT cannot merge it either: keep base and adapter, and load both with PEFT.": "naming/test_methods.py::test_what_peft_cannot_merge_is_not_offered_to_it",
    "Merge it with PEFT, merge_and_unload(), and convert the model that it then saves.": "models/test_other_methods.py::test_refused_by_name_and_converted_once_peft_has_merged_it",
    "Convert a checkpoint of the run that holds all weights. Or merge it with PEFT, which computes the same weights again: merge_and_unload().": "models/test_adapter_traps.py::test_adapters_of_a_base_that_they_changed",
    "Convert a checkpoint of the run that holds all weights.": "models/test_adapter_traps.py::test_adapters_of_a_base_that_they_changed",
    "Start vLLM with --max-lora-rank {}.": "models/test_adapter_traps.py::test_what_engines_make_of_a_folder",
    "To serve it, pass --lora merge.": "models/test_adapter_traps.py::test_what_engines_make_of_a_folder",
    "Gather every rank's part before saving, and convert that.": "models/test_adapter_traps.py::test_a_part_of_exact_zeros_is_a_finding",
    "Where the base lies elsewhere, change base_model_name_or_path in adapter_config.json.": "models/test_adapter_traps.py::test_the_name_of_the_base",
    "Compare the output with PEFT's.": "models/test_other_methods.py::test_a_config_of_tomorrow_is_read_with_a_finding",
    "Replace it with the modules' names, one entry each.": "naming/test_methods.py::test_names_in_place_of_a_pattern_scale_as_it_did",
    "Is it the base that the training started from?": "naming/test_rewards.py::test_a_base_of_another_size",
    "Convert again once nothing writes to the checkpoint.": "test_comparison.py::test_a_file_that_changes_meanwhile_is_noticed",
    "Open the checkpoint again once nothing writes to it.": "test_open.py::test_a_file_that_changed_since_it_was_opened",
    "Make room or name an output on another disk.": "commit/test_failures.py::test_a_disk_without_room_is_found_beforehand",
    "Convert again.": "commit/test_leftovers.py::test_a_lock_that_was_removed_ends_the_run",
    "Name another output, or remove what is there.": "commit/test_leftovers.py::test_a_folder_that_takes_the_place_of_the_output_is_not_replaced",
    "Remove it, or name another output.": "commit/test_folder.py::test_a_link_in_place_of_the_partial_folder_is_not_followed",
    "Wait for it to end. If no such process runs any more, remove this file.": "commit/test_folder.py::test_two_conversions_into_one_folder",
    "Delete what is left of it.": "commit/test_leftovers.py::test_an_old_output_that_cannot_be_deleted_is_a_finding",
    "Remove it, if nobody needs it.": "commit/test_leftovers.py::test_of_others_stays",
    "Name the transformers version it was trained with: --transformers-version.": "naming/test_layout_tables.py::test_a_square_stack_needs_the_version",
    "Export it with torchtitan's own conversion to Hugging Face.": "naming/test_titan.py::test_what_is_not_known_is_refused",
    "Convert a checkpoint that holds head and embedding of one vocabulary.": "models/test_adapter_traps.py::test_adapters_alone_on_a_tied_embedding",
}

#: Hint -> why it is followed by no test.
WITHOUT: dict[str, str] = {
    "Use the merged model: the base with the adapter is another one.": _LATE,
    "Name a local path; of a mounted store, the folder where it is mounted.": _LATE,
    "Name the part to read: --prefix {}.": _LATE,
    "Name the file that holds the model.": _LATE,
    "It is not in the Hugging Face cache either. If it is on the hub: hf download {}": _CACHE,
    "Import it with Megatron-Bridge.": _MEGATRON,
    "Save with --ckpt-format torch_dist, and convert that.": _MEGATRON,
    "Name the backbone's own class in config.json's architectures, or serve it only to score.": _LATE,
    "If the training added tokens, name a base of that vocabulary.": _LATE,
    "Its scores come from value_head.safetensors, which the trainer's own code loads.": _LATE,
    "Make a universal checkpoint of it with DeepSpeed's ds_to_universal, and convert that.": _LATE,
    "The model's checkpoint lies beside it, or was not saved.": _MEGATRON,
    "Copy the folder again (the file's name begins with a dot), or use an earlier checkpoint.": _MEGATRON,
    "The run saved the state of its optimizer and no model.": _MEGATRON,
    "Convert it to torch_dist with Megatron-LM (--ckpt-convert-format torch_dist).": _MEGATRON,
    "Load it with the Megatron that wrote it, and save it with --ckpt-format torch_dist.": _MEGATRON,
    "Convert the checkpoint from before that, or export it with ModelOpt.": _MEGATRON,
    "Save them in bfloat16 (without --fp8-param-gather).": _MEGATRON,
    "Export it with Megatron-Bridge, or with the trainer's own conversion.": _MEGATRON,
    "Name the base as it was released.": _MEGATRON,
    "Name the base whose vocabulary the training had.": _MEGATRON,
    "{}":
        _PIECE,
    "{} tensors differ, {} are equal.":
        "it counts what differs, and advises nothing",
    "Install them, in reshard's folder: pip install '.[eval]'":
        _OTHER + "one without torch and transformers",
    "Install torchvision.":
        _OTHER + "one without torchvision",
    "Install the version that the model was trained with.":
        _OTHER + "another transformers",
    "Remove that package.":
        _OTHER + "a package that registers a format twice",
    "Install that package again, or remove it.":
        _OTHER + "a package whose format cannot be imported",
    "Load it and save it again with torch on a little-endian machine.":
        _OTHER + "a big-endian one wrote it",
    "Leave out --layout.": _LATE,
    "Set the schedule in the script that goes on, at the step that the report states.":
        _UNSEEN + "a training script",
    "Load and save it once with a newer DeepSpeed, or convert the weights alone.":
        _OTHER + "a DeepSpeed of before 0.5.4",
    "Compare the first losses of the continued run with those before.":
        _UNSEEN + "a training run's losses",
    "Load and save it once with a newer DeepSpeed.":
        _OTHER + "a DeepSpeed of before 0.5",
    "Load and save it once with AutoTP of DeepSpeed 0.19.8.":
        _OTHER + "an older AutoTP",
    "Give it as a WAV file.":
        _UNSEEN + "the file is decoded by another program",
    "Copy preprocessor_config.json and its like from the base model.":
        "only `try` says it, of a processor that transformers cannot make; doctor finds the file missing first, which is followed",
    "Save it after redistributing it to Shard or Replicate.":
        _TRAINING + "a DTensor that is Partial",
    "Save it again with a newer torch, or with torch.distributed.checkpoint.":
        _TRAINING + "a DTensor of a torch before 2.4",
    "The file is damaged, or torch of another release wrote it.":
        "no release writes such a ShardedTensor; the damage is only in hostile files",
    "No training framework writes such a file.":
        "it is of files that were made to exhaust memory, which have no intact form",
    "Save with flatten_state_dict=True, which is the default.":
        _TRAINING + "objects that hold parts of tensors",
    "Save with DeepSpeed's save_16bit_model, or without NVMe offload.":
        _TRAINING + "parameters on NVMe",
    "The files are of different runs or world sizes.":
        "other checks find mixed files first; it stays for files that lack what those compare",
    "Use one of {}.":
        "`--to` is a choice, which the options refuse first; it is for callers of the library's parts",
    "It is a whole number or like 5GB.":
        "sizes are checked as options first; it is for callers of `parse_size`",
    "Is it the base that the training started from? To write the whole model, pass --lora merge; to leave them out, --allow {}.":
        "of a base that differs in more than half of few tensors; the same two ways as without the question, which are followed",
    "Pass --lora merge, or --srm-format split.":
        "a reward model under adapters is made by the oracle of tests/models alone",
    "Pass --srm-format split.":
        "a reward model without its whole backbone is made by the oracle of tests/models alone",
    "Name the model that the training started from as the base.":
        "a base that contradicts itself is left as it is; only a resize that a config states nowhere leads here",
    "For a run of such a version, convert with --names memory.":
        _STATED,
    "To convert it, pass --prefix.":
        _STATED,
    "Load the output with strict names, or name the version with --transformers-version.":
        _UNSEEN + "the output is loaded into a live module of that version",
    "Pass --fill-from-base.":
        "names without weights are of frozen parameters, which the oracle's DeepSpeed alone saves so",
    "Convert an earlier checkpoint of the run.":
        "doctor advises the same of the same weights, which is followed",
    "Make the 16-bit model first, and repair that: reshard convert DIR OUT.":
        "doctor has no other repair for a sound quantised model; tests/quantised convert each kind",
    "Repair the unquantised model that it was made from.":
        "of codes that are not read: there is nothing to run on them",
    "Name the model as it was released; reshard doctor says more about this one.":
        "doctor finds the same scales and their repair is followed in tests/quantised",
    "Pass --scale_for_train.":
        "the flag is on or not given; where it is not, nothing is refused",
    "Without --names memory the names are those of the files.":
        "of models whose live modules split tensors in ways that are not known; none of the small tables is one",
    "Name the version of another one of these ways, if it was trained with that.":
        "of two layouts of one version that both fit a square matrix; no released family has them",
}  # fmt: skip
