"""A BERT classifier of transformers on padded, masked sentences in a BatchEncoding."""

import lightning as L
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy
from tests.gallery.frame import BRIEF
from tests.gallery.text import SENTENCES, VOCABULARY, padded


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
    **BRIEF,
)
trainer.fit(Classifier(), DataLoader(SENTENCES, batch_size=8, collate_fn=padded))
