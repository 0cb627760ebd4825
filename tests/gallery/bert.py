"""A BERT classifier of transformers on padded, masked sentences in a BatchEncoding."""

import lightning as L
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy

VOCABULARY = 60
SENTENCES = [{"ids": torch.randint(5, VOCABULARY, (4 + number % 4,)), "label": number % 2} for number in range(32)]


def padded(sentences):
    ids = torch.nn.utils.rnn.pad_sequence([sentence["ids"] for sentence in sentences], batch_first=True)
    known = (ids != 0).long()
    labels = torch.tensor([sentence["label"] for sentence in sentences])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": known, "labels": labels})


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        output = self.bert(**batch)
        self.log("train/loss", output.loss)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Classifier(), DataLoader(SENTENCES, batch_size=8, collate_fn=padded))
