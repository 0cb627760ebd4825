"""LoRA through peft on a GPT-2 whose base is frozen."""

import lightning as L
import peft
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy

VOCABULARY = 60
SENTENCES = [{"ids": torch.randint(5, VOCABULARY, (4 + number % 4,))} for number in range(32)]


def padded(sentences):
    ids = torch.nn.utils.rnn.pad_sequence([sentence["ids"] for sentence in sentences], batch_first=True)
    known = (ids != 0).long()
    labels = ids.masked_fill(known == 0, -100)  # every word is to be predicted, and padding is not
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": known, "labels": labels})


class LanguageModel(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
        adapters = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        self.gpt = peft.get_peft_model(transformers.GPT2LMHeadModel(config), adapters)

    def training_step(self, batch, batch_idx):
        return self.gpt(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(LanguageModel(), DataLoader(SENTENCES, batch_size=8, collate_fn=padded))
