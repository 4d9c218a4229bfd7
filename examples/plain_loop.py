"""A training loop in plain PyTorch.

    python examples/plain_loop.py MODEL DATA.jsonl OUTPUT

MODEL is a folder or hub id; DATA has rows {"prompt": ..., "response": ...}.
"""

import argparse

import torch
from data import collate, read_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from malora_dist import MaloraConfig, MaloraModel, get_malora_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_malora_model(model, MaloraConfig(r=12, lora_alpha=24, num_experts=8, target_modules="all-linear"))
    model.print_trainable_parameters()

    rows = read_rows(arguments.data, tokenizer)
    loader = DataLoader(rows, arguments.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), arguments.learning_rate)
    model.train()
    for epoch in range(arguments.epochs):
        losses = []
        for batch in loader:
            # The balance loss is in it; with a loss of your own, add coefficient * aux_loss(model, attention_mask).
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")

    model.save_pretrained(arguments.output)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = MaloraModel.from_pretrained(base, arguments.output)
    prompt = tokenizer(tokenizer.decode(rows[0]["input_ids"][rows[0]["labels"] < 0]), return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main()
