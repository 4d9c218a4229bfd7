"""The mathematics: tensors in, tensors out. No state, no configuration, no communication.

Shape letters: T tokens, I in_features, O out_features, E experts, K top-k, R expert rank r, D width of what enters an
expert (shared_r for MALoRA, I for MoLoRA and LoRA), L layers. Tensors carry them as suffixes (`x_TI`).
"""
