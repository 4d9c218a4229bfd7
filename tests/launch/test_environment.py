from malora_dist.launch.environment import allocator_variables


def test_the_allocators_segments_grow_unless_the_user_has_said_otherwise() -> None:
    assert allocator_variables({"PYTORCH_OTHER": "1"}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator_variables({name: "max_split_size_mb:128"}) == allocator_variables({name: ""}) == {}
