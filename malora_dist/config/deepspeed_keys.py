"""Keys of DeepSpeed's configuration: those passed on, and those refused with the value that is harmless and why."""

TOP_LEVEL_KEYS = frozenset(
    {
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "memory_breakdown",
        "steps_per_print",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)

ZERO_KEYS = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "param_persistence_threshold",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
    }
)

OFFLOAD_KEYS = {
    "offload_optimizer": frozenset(
        {"device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio"}
    ),
    "offload_param": frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}),
}

_OWN_OPTIMIZER = (
    "the optimizer and its schedule are the recipe's (train.optim, train.learning_rate, train.lr_scheduler_type)"
)
_MICS = "MiCS splits weights over part of the processes only, which this package does not support"
_QUANTISED = "quantised communication changes the numbers of frozen 4-bit weights and of adapter gradients"

# key: (value that changes nothing, why any other is refused)
REFUSED_KEYS: dict[str, tuple[object, str]] = {
    "optimizer": (None, _OWN_OPTIMIZER),
    "scheduler": (None, _OWN_OPTIMIZER),
    "expert_parallel": (
        None,
        "AutoEP replaces the base model's own expert layers and cannot express experts of an adapter",
    ),
    "sequence_parallel_size": (
        1,
        "sequence parallelism is not supported: micro-batches are not split along the sequence",
    ),
    "tensor_parallel": (None, "tensor parallelism is not supported: adapters wrap whole linear layers"),
    "activation_checkpointing": (None, "use train.gradient_checkpointing"),
    "data_types": (None, "gradients are always accumulated in fp32"),
    "amp": (None, "the engine runs in fp32; precision of the base is model.dtype"),
    "torch_autocast": (None, "the engine runs in fp32; precision of the base is model.dtype"),
    "elasticity": (None, "global_batch_size is constant here; give the number of processes to the launcher"),
    "prescale_gradients": (False, "the loss is normalised for a plain mean over processes"),
    "gradient_predivide_factor": (1.0, "the loss is normalised for a plain mean over processes"),
    "gradient_allreduce_op": ("mean", "the loss is normalised for a plain mean over processes"),
    "data_efficiency": (None, "the order of samples is the recipe's (data.mixture, train.seed)"),
    "curriculum_learning": (None, "the order of samples is the recipe's (data.mixture, train.seed)"),
    "compression_training": (None, "the base is frozen; 4-bit weights are model.load_in_4bit"),
    "tensorboard": (None, "use train.report_to"),
    "wandb": (None, "use train.report_to"),
}

REFUSED_ZERO_KEYS: dict[str, tuple[object, str]] = {
    "zero_hpz_partition_size": (1, "hierarchical partitioning (hpZ) crashes with these adapters; remove it"),
    "mics_shard_size": (-1, _MICS),
    "mics_hierarchical_params_gather": (False, _MICS),
    "zero_quantized_weights": (False, _QUANTISED),
    "zero_quantized_nontrainable_weights": (False, _QUANTISED),
    "zero_quantized_gradients": (False, _QUANTISED),
    "leaf_module": (None, "with leaf modules the reduction of adapter gradients crashes; they are not needed here"),
    "round_robin_gradients": (False, "the optimizer's state can then not be read back, which checkpoints need"),
    "zenflow": (None, "it brings its own optimizer; the recipe's is train.optim"),
    "cpu_offload": (False, 'renamed; use offload_optimizer: {"device": "cpu"}'),
    "cpu_offload_param": (False, 'renamed; use offload_param: {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": (False, "renamed; use pin_memory in the offload block"),
    "elastic_checkpoint": (False, "adapters are saved in this package's own files"),
    "load_from_fp32_weights": (True, "adapters are saved in this package's own files"),
    "stage3_gather_fp16_weights_on_model_save": (
        False,
        "renamed; use stage3_gather_16bit_weights_on_model_save",
    ),
    "legacy_stage1": (False, "only the present stage 1 is supported"),
    "parameter_alignment": (False, "not tested with packed 4-bit weights"),
    "allgather_sequential": (False, "not tested with packed 4-bit weights"),
    "stage3_allgather_sequential": (False, "not tested with packed 4-bit weights"),
    "override_module_apply": (True, "base and adapters are built by this package"),
    "pipeline_loading_checkpoint": (False, "pipeline parallelism is not supported"),
    "compute_grad_norm": (True, "clipping and the logged grad_norm need it"),
    "save_muon_momentum_buffer_in_memory": (False, "the recipe's optimizer is train.optim"),
}
