"""SFTTrainer of TRL (pip install trl), which reads prompts and completions itself.

python examples/sft_trainer.py MODEL DATA.jsonl OUTPUT
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from malora_dist import MaloraConfig, get_malora_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_malora_model(model, MaloraConfig(r=12, lora_alpha=24, num_experts=8, target_modules="all-linear"))
    lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in map(json.loads, lines)]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=arguments.output,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=2,
            learning_rate=arguments.learning_rate,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="epoch",
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    for record in trainer.state.log_history:
        if "loss" in record:
            print(f"epoch {record['epoch']:g}: loss {record['loss']:.4f} balance {record['aux_loss']:.3f}")
    trainer.save_model(f"{arguments.output}/adapter")


if __name__ == "__main__":
    main()
