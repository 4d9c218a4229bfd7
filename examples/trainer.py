"""Trainer of transformers, with checkpoints it goes on from and the best of them at the end.

    python examples/trainer.py MODEL DATA.jsonl OUTPUT

Its folders checkpoint-N are adapter folders; the same command with --resume goes on from the last.
"""

import argparse

from data import collate, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from malora_dist import MaloraConfig, get_malora_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_malora_model(model, MaloraConfig(r=12, lora_alpha=24, num_experts=8, target_modules="all-linear"))
    rows = read_rows(arguments.data, tokenizer)
    held_out = max(1, len(rows) // 10)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            learning_rate=arguments.learning_rate,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            report_to=[],
        ),
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    for record in trainer.state.log_history:
        if "loss" in record:
            print(f"epoch {record['epoch']:g}: loss {record['loss']:.4f}")
    model.save_pretrained(f"{arguments.output}/best")


if __name__ == "__main__":
    main()
