"""A GPT-2 of transformers with tied embeddings, an attention mask and labels of -100, that writes after fit."""

import lightning as L
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
        self.gpt = transformers.GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.gpt(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


model = LanguageModel()
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(model, DataLoader(SENTENCES, batch_size=8, collate_fn=padded))

start = SENTENCES[0]["ids"][None]
written = model.gpt.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=3, pad_token_id=0)
assert written.shape[1] > start.shape[1]
