"""What becomes of each hint: the scenarios that follow it, or the reason why none here does.

`SCENARIOS` register their cases by the hints that they follow. `ELSEWHERE` are hints that another
test raises and follows; `WITHOUT` those that no test can follow, each with the reason. A hint of
the sources that stands in none of them fails `test_inventory`, and so does a line here without a
hint.
"""

from __future__ import annotations

from tests.hints import (
    adapted,
    codes,
    damaged,
    doctors,
    fits,
    flags,
    folders,
    megatrons,
    outputs,
    parts,
    places,
    rarer,
    states,
    trials,
)

SCENARIOS = (adapted, doctors, codes, damaged, fits, flags, folders, megatrons, outputs, parts,
             places, rarer, states, trials)  # fmt: skip

_TRAINING = "it is followed in the training run, which saves otherwise: "
_PIECE = "no hint by itself: the text is put together from others, which stand here"
_OTHER = "it needs another machine or package: "
_STATED = "each finding of this code states a fix of its own, which stands here"
_GUARD = "a last look at the plan, which every input that is known is refused before"
_UNSEEN = "what is done outside leaves nothing to run: "

#: Hint -> the test, `file::function` below `tests/`.
# ruff: noqa: E501
ELSEWHERE: dict[str, str] = {
    "Load it on one rank, or with offload_optimizer, by ZeRO stage 1 or 2.": "state/test_live_targets.py::test_what_was_saved_is_what_the_target_holds",
    "Load it with ZeRO stage 1 or 2.": "state/test_live_targets.py::test_what_was_saved_is_what_the_target_holds",
    "Wait for the run that writes it. If it was killed, run its command again; with --resume it goes on.": "remote/test_resuming.py::test_the_same_bytes_wherever_it_was_killed",
    "Wait for it. If it runs no more, pass --overwrite, or convert again {} minutes after its end.": "remote/test_resuming.py::test_a_run_of_another_machine",
    "Delete it, if nobody needs it, or name another output.": "remote/test_resuming.py::test_a_journal_that_is_damaged_or_of_another_run",
    "Name another output, or move away what is yours.": "remote/test_resuming.py::test_what_is_someone_elses_stays",
    "Wait for it, or name another output.": "remote/test_resuming.py::test_a_run_gives_signs_of_life_and_notices_another",
    "It is deleted. Convert again with --resume: it is made again, and the other files are reused.": "remote/test_resuming.py::test_objects_that_are_others_by_now",
    "Save it with FSDP.optim_state_dict, or convert the weights alone, without --optimizer.": "state/test_fsdp1.py::test_lengths_that_fit_no_module",
    "FSDP1's FULL_STATE_DICT on the CPU causes this: save with SHARDED_STATE_DICT. In all other cases a file is damaged. Copy the checkpoint again, or use another save. The weights alone: leave out --optimizer.": "state/test_fsdp1.py::test_what_fsdp1_gathers_by_numbers",
    "Freeze them in the run that continues: one that trains them asks for their moments.": "state/test_curves.py::test_the_curve_is_unbroken",
    "Install the extra, in reshard's folder: pip install '.[ray]'.": "cluster/test_refusals.py::test_without_ray",
    "Pass --engine ray, or leave out --ray-address.": "cluster/test_refusals.py::test_an_address_without_the_engine",
    "Run the command on a node of the cluster, with --ray-address auto.": "cluster/test_ray.py::test_addresses",
    "ray status shows the address of a cluster.": "cluster/test_ray.py::test_addresses",
    "Run the command on a node of the cluster (see ray status), with --ray-address auto.": "cluster/test_ray.py::test_addresses",
    "Leave out ray_address, or call ray.shutdown() first.": "cluster/test_ray.py::test_addresses",
    "Leave out --engine: threads of this process do the same.": "cluster/test_refusals.py::test_a_cluster_that_cannot_be_had",
    "Install the same version on every node.": "cluster/test_wire.py::test_errors_come_back_as_they_were",
    "Source, base and output must lie on storage that every node has under the same path.": "cluster/test_wire.py::test_errors_come_back_as_they_were",
    "If its nodes lack memory, run fewer pieces at a time: --threads N.": "cluster/test_ray.py::test_a_task_that_ends_its_workers",
    "Name its path.": "remote/test_hub_and_web.py::test_urls_that_are_refused",
    "Supported are s3://, gs://, az://, hf:// and https://. For a mounted store, name the folder "
    "where it is mounted.": "remote/test_hub_and_web.py::test_urls_that_are_refused",
    "Leave it out; the store's own settings hold credentials (docs/remote.md).": "remote/test_hub_and_web.py::test_urls_that_are_refused",
    "Write it as s3://BUCKET/FOLDER, without empty names, `.` and `..`.": "remote/test_hub_and_web.py::test_urls_that_are_refused",
    "Write it as hf://OWNER/NAME or hf://OWNER/NAME@REVISION.": "remote/test_hub_and_web.py::test_a_model_of_the_hub",
    "Name an output in s3://, gs:// or az://, or a local folder.": "remote/test_writing.py::test_the_command_says_where_it_wrote",
    "Install the extra, in reshard's folder, with Python 3.11 or newer: pip install '.[remote]'.": "remote/test_reading.py::test_without_the_extra",
    "Copy the folder here, and name the copy.": "remote/test_hub_and_web.py::test_a_web_server",
    "To write the layout of the released model, pass --names hub.": "models/test_released_layout.py::test_a_base_in_another_layout",
    "Write the version into the base's config.json, as transformers_version.": "models/test_released_layout.py::test_an_orientation_that_nothing_tells",
    "To write them: reshard doctor OUT --repair REPAIRED.": "models/test_released_layout.py::test_fields_that_the_base_lacks_are_said",
    "Pass --to hf, or leave out --names.": "models/test_released_layout.py::test_dcp_has_no_released_layout",
    "Write it in the layout of the release: reshard convert DIR OUT --names hub.": "doctor/test_engines.py::test_names_of_a_loaded_model",
    "Move them into a folder below, or away.": "doctor/test_engines.py::test_a_head_file_without_an_index",
    " Or convert the run again: reshard writes an index, which keeps them apart.": "doctor/test_engines.py::test_a_head_file_without_an_index",
    "Make the 16-bit model: reshard convert DIR OUT.": "doctor/test_engines.py::test_codes_that_mlx_does_not_read",
    "Make a universal checkpoint of it with DeepSpeed's ds_to_universal, and convert that.": "deepspeed/test_autoep.py::test_the_checkpoint_itself_leads_to_the_universal_one",
    "Leave out --masters.": "megatron/test_masters.py::test_without_masters_to_read",
    "{} Or load the checkpoint into the run, and save it with --dist-ckpt-optim-fully-reshardable.": "megatron/test_masters.py::test_without_masters_to_read",
    "Pass --base, the model as it was released, whose names they then get.": "megatron/test_into.py::test_tensors_without_a_place",
    "Is it the whole model? What it lacks is taken from another by --base MODEL --fill-from-base.": "megatron/test_into.py::test_a_model_that_lacks_tensors",
    "Copy the checkpoint again, or use another save. Experts that were made of one layer are alike before they are trained.": "doctor/test_checkpoints.py::test_weights_that_cannot_be_right",
    "To have all of it examined: reshard doctor {}.": "doctor/test_checkpoints.py::test_a_model_below_the_folder_is_to_be_named",
    "The run diverged: use an earlier checkpoint of it.": "doctor/test_checkpoints.py::test_weights_that_cannot_be_right",
    "They were never filled, or were lost in saving: use another save of the run.": "doctor/test_checkpoints.py::test_weights_that_cannot_be_right",
    "Nothing was trained, or another checkpoint is meant: name that.": "doctor/test_checkpoints.py::test_what_its_base_says",
    "Convert it, and name the output: reshard convert SRC OUT --base HF_DIR.": "doctor/test_checkpoints.py::test_what_is_asked_of_models_alone",
    "Convert the model as the hub has it.": "naming/test_meta.py::test_parts_of_several_gpus",
    "Pass --to hf: programs that read such models read the hub's files.": "naming/test_meta.py::test_what_metas_code_does_not_compute",
    "Is the config that of this model?": "megatron/test_into.py::test_shapes_that_are_not_the_configs",
    "Leave out --names.": "megatron/test_into.py::test_names_are_the_trainers",
    "Change into a folder that exists, or name the whole path.": "test_door.py::test_the_current_folder_is_gone",
    "Copy the folder again, from where it was saved.": "fsdp/test_refusals.py::test_one_ranks_file_over_anothers",
    "The metadata is damaged, or the save did not finish.": "fsdp/test_metadata_refusals.py::test_chunk_without_a_place",
    "Save again with use_collectives=True, or move the files of the other ranks away.": "fsdp/test_refusals.py::test_replicas_that_differ",
    "Install the extra, in reshard's folder: pip install '.[html]'.": "pages/test_changes.py::test_a_page_needs_jinja2",
    "Name the folder above it, or convert it: reshard convert SRC DST.": "watching/test_watch.py::test_what_is_refused_at_once",
    "Name another folder for the outputs of this run.": "watching/test_watch.py::test_what_is_refused_at_once",
    "Remove it: watch leaves existing outputs as they are.": "watching/test_watch.py::test_what_is_refused_at_once",
    "Leave out --chat: reshard try then scores the prompts.": "evaluate/test_chat.py::test_what_cannot_be_talked_with",
    "Copy chat_template.jinja from the base model, or leave out --chat.": "evaluate/test_chat.py::test_what_cannot_be_talked_with",
    "Load it with the extension that wrote it, and save it again without the transform.": "fsdp/test_refusals.py::test_unknown_transform",
    "The folder holds files from different saves.": "fsdp/test_refusals.py::test_writers_of_different_saves",
    "It holds shards from different saves; keep those of one save.": "fsdp/test_refusals.py::test_shards_of_different_saves",
    "The metadata is damaged; copy it again, or use another checkpoint.": "fsdp/test_metadata_refusals.py::test_tables_of_the_metadata_that_contradict_each_other",
    "It was not written by torch.distributed.checkpoint.": "fsdp/test_metadata_refusals.py::test_item_that_is_no_tensor",
    "The file is damaged or was crafted to mislead.": "fsdp/test_refusals.py::test_zstd_frame_that_swells",
    "A rank's part is missing.": "fsdp/test_metadata_refusals.py::test_hole",
    "Copy the whole folder again.": "fsdp/test_refusals.py::test_writers_without_collectives",
    "Copy the file again or use another checkpoint.": "fsdp/test_refusals.py::test_damaged_zstd_frame",
    "Install the extra, in reshard's folder: pip install '.[zstd]'.": "fsdp/test_refusals.py::test_without_zstandard",
    "For such a run, convert with --names memory --transformers-version {}, or with the run's "
    "own version.": "models/test_every_name.py::test_a_layout_that_stacks_is_a_finding_whose_fix_works",
    "Read that code, then allow it with --trust-remote-code.": "evaluate/test_broken.py::test_remote_code_runs_only_when_it_is_trusted",
    "Name a file with --html.": "pages/test_changes.py::test_a_file_that_is_no_page_is_never_replaced",
    "Copy the files of every rank and layer.": "deepspeed/test_pipeline.py::test_a_layer_whose_file_is_missing",
    "Check that --base is the model that the training started from. Convert it without --base: "
    "the tensors keep their names, by which a script of yours can rename them.": "deepspeed/test_pipeline.py::test_a_base_of_other_layers",
    "Convert it without --base: the tensors keep their names, by which a script of yours can rename them.": "deepspeed/test_pipeline.py::test_tensors_that_fit_several_of_the_bases",
    "Copy the files of every rank and expert.": "deepspeed/test_experts.py::test_a_missing_expert_is_named",
    "Copy every rank's files.": "deepspeed/test_tensor_parallel.py::test_missing_files_are_named",
    "Load and save it once with AutoTP of DeepSpeed 0.19.8, or export it with the framework that trained it.": "deepspeed/test_tensor_parallel.py::test_without_the_metadata_it_is_refused",
    "Convert the checkpoint that it was made from.": "deepspeed/test_universal.py::test_made_from_other_parallelism_it_is_refused",
    "Pass {}, or leave out --optimizer.": "state/test_written_options.py::test_options_that_do_not_go_together",
    "Pass --layout torchtitan, or leave out --layout.": "state/test_torchtitan.py::test_another_layout_is_refused",
    "Pass --names memory, or leave out --names.": "state/test_written_options.py::test_options_that_do_not_go_together",
    "Pass --to dcp --optimizer, or leave out --{}.": "state/test_written_options.py::test_options_that_do_not_go_together",
    "Pass --optimizer, or leave out --{}.": "state/test_written_options.py::test_options_that_do_not_go_together",
    "Leave out --hyperparameters.": "state/test_written_options.py::test_hyperparameters_that_the_checkpoint_states",
    "To keep the adapter and its moments, leave out --base and the options that act on it. To merge the weights alone, pass --to hf without --optimizer.": "state/test_matrix.py::test_merged_adapters",
    "Leave out --base and the options that act on names: without them the names stay, and the state travels with them.": "state/test_writing.py::test_a_base_whose_names_the_moments_do_not_fit",
    "Pass --consumed-samples.": "state/test_written_options.py::test_the_samples_that_a_run_consumed_can_be_given",
    "Leave out --layout.": "state/test_universal.py::test_options_that_have_no_place",
    "Leave out --max-shard-size.": "state/test_universal.py::test_options_that_have_no_place",
    "Write it with --to dcp, which has a step for each parameter.": "state/test_universal.py::test_a_group_of_different_steps",
    "A new run starts from a Hugging Face model: pass --to hf, and load the output with from_pretrained before deepspeed.initialize.": "state/test_universal.py::test_weights_without_a_state",
    "Create the script's parameter groups in this order.": "state/test_curves.py::test_a_run_that_does_what_a_finding_says",
    "Load it with ZeRO stage 1 or 2, or run the code in docs/training-state.md after loading.": "state/test_curves.py::test_a_run_that_does_what_a_finding_says",
    "Start the script with the weights that the run started from.": "state/test_curves.py::test_a_run_that_does_what_a_finding_says",
    "In a script with a schedule, pass load_lr_scheduler_states=False to load_checkpoint.": "state/test_universal.py::test_a_script_with_a_schedule_and_a_folder_without",
    "Leave out --dtype.": "state/test_writing.py::test_masters_that_are_rounded_are_a_finding",
    'Write a list with an object for each group: [{"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}].': "state/test_written_options.py::test_hyperparameters_that_are_none",
    'Pass --hyperparameters with a JSON file of them, a list with an object for each group: [{"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}].': "state/test_written_options.py::test_hyperparameters_that_no_file_holds_are_asked_for",
    "Leave out --optimizer.": "state/test_comparing.py::test_a_side_without_state",
    "Convert the weights alone, without --optimizer.": "state/test_refusals.py::test_eight_bit_moments",
    "Convert the weights alone, without --optimizer; or save once without --use_mp_opt.": "state/test_refusals.py::test_one_optimizer_file_a_rank",
    "Save it with get_optimizer_state_dict, or convert the weights alone.": "state/test_refusals.py::test_numbers_for_names",
    "The file is damaged, or of an optimizer that is not supported.": "state/test_refusals.py::test_groups_that_do_not_cover_the_parameters",
    "Resume the run once with ZeRO stage 1 and save, or convert the weights alone.": "state/test_refusals.py::test_without_zero_groups_in_no_order_of_the_model",
    "Make the universal checkpoint again.": "deepspeed/test_universal.py::test_masters_of_another_save",
    "Copy the whole folder, or make the universal checkpoint again.": "deepspeed/test_universal.py::test_a_missing_master_is_named",
    "Use another save; or, if this file is the newer, move the *_optim_states.pt files away: it holds all weights.": "deepspeed/test_refusals.py::test_a_tag_that_was_saved_again_in_another_stage",
    "The files come from different runs, or files of ranks were renamed.": "deepspeed/test_refusals.py::test_two_ranks_are_exchanged",
    "Or convert the model that was exported beside it: name its file.": "test_locate.py::test_of_an_incomplete_checkpoint_with_its_export_the_error_names_that",
    "Save without offloading to the CPU, or with SHARDED_STATE_DICT.": "ranks/test_refusals.py::test_slices_that_were_copied_off_their_flat_parameter",
    "Take it from the base: --fill-from-base.": "naming/test_fit.py::test_a_head_stays_behind_an_embedding_that_was_trained_apart",
    "The base's has shape {}: save the head too, with the whole model.": "models/test_adapter_traps.py::test_one_of_a_resized_pair_is_saved_alone",
    "Load the checkpoint into the training run and save it with SHARDED_STATE_DICT.": "ranks/test_read.py::test_flattened_tensors_need_a_base_that_fits",
    "Pass --base, the model that the training started from.": "ranks/test_read.py::test_flattened_tensors_need_a_base_that_fits",
    "Name the base that the training started from.": "ranks/test_read.py::test_flattened_tensors_need_a_base_that_fits",
    "Merge it with PEFT, merge_and_unload(), and convert the model that it then saves.": "models/test_other_methods.py::test_refused_by_name_and_converted_once_peft_has_merged_it",
    "Convert a checkpoint of the run that holds all weights. Or merge it with PEFT, which computes the same weights again: merge_and_unload().": "models/test_adapter_traps.py::test_adapters_of_a_base_that_they_changed",
    "Convert a checkpoint of the run that holds all weights.": "models/test_adapter_traps.py::test_adapters_of_a_base_that_they_changed",
    "Gather the parts of all ranks before saving, and convert that save.": "models/test_adapter_outputs.py::test_a_part_of_exact_zeros_is_a_finding",
    "Name the transformers version it was trained with: --transformers-version.": "naming/test_layout_tables.py::test_a_square_stack_needs_the_version",
    "Save it again with a newer torch, or with torch.distributed.checkpoint.": "ranks/test_placements.py::test_two_cuts_of_one_dimension_need_their_order",
    "The file is damaged, or another version of torch wrote it.": "ranks/test_refusals.py::test_a_record_that_lacks_a_part",
    "Load and save it once with AutoTP of DeepSpeed 0.19.8.": "deepspeed/test_tensor_parallel_metadata.py::test_metadata_of_an_older_autotp",
}

#: Hint -> why it is followed by no test.
WITHOUT: dict[str, str] = {
    "Install reshard {} on every node.":
        _OTHER + "a node without it",
    "Name it by https://.":
        _OTHER + "one that serves it encrypted",
    "Import it with torchtitan's own conversion from Hugging Face.":
        _OTHER + "one with torchtitan",
    "{}": _PIECE,
    "Export it with the framework that trained it, as Megatron-DeepSpeed.":
        _OTHER + "one with Megatron-DeepSpeed",
    "Start vLLM with --max-lora-rank {}.":
        _OTHER + "one that vLLM runs on",
    "Convert a checkpoint that holds head and embedding of one vocabulary.":
        _GUARD,
    "Import it with Megatron-Bridge.":
        _OTHER + "one with Megatron-Bridge",
    "Install torchvision.":
        _OTHER + "one without torchvision",
    "In the script that continues the run, set the schedule to the step in the report.":
        _UNSEEN + "a training script",
    "Compare the first losses of the continued run with the last ones before.":
        _UNSEEN + "a training run's losses",
    "Name the model that the training started from as the base.":
        _GUARD,
    "For a run with such a version, convert with --names memory.":
        _STATED,
    "To convert it, pass --prefix.":
        _STATED,
    "Name the output first: reshard verify OUT --against SRC.":
        _STATED,
}  # fmt: skip
