"""A loop with accelerate, on any number of processes.

accelerate launch --num_processes 2 examples/accelerate_loop.py MODEL DATA.jsonl OUTPUT
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from data import collate, read_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from malora_dist import MaloraConfig, get_malora_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    set_seed(0)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    # Initial values depend on the seed and the layers' names alone: they are the same on every process.
    model = get_malora_model(model, MaloraConfig(r=12, lora_alpha=24, num_experts=8, target_modules="all-linear"))
    loader = DataLoader(read_rows(arguments.data, tokenizer), arguments.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), arguments.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for epoch in range(arguments.epochs):
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
        accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(arguments.output, is_main_process=accelerator.is_main_process)
    accelerator.end_training()


if __name__ == "__main__":
    main()
