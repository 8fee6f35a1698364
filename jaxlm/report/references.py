"""BibTeX of the methods that a sweep used."""

from __future__ import annotations

from jaxlm.report.artifacts import Json, part

ENTRIES = {
    "kaplan2020scaling": """\
@article{kaplan2020scaling,
  title   = {Scaling Laws for Neural Language Models},
  author  = {Kaplan, Jared and McCandlish, Sam and Henighan, Tom and Brown, Tom B. and
             Chess, Benjamin and Child, Rewon and Gray, Scott and Radford, Alec and
             Wu, Jeffrey and Amodei, Dario},
  journal = {arXiv preprint arXiv:2001.08361},
  year    = {2020}
}
""",
    "hoffmann2022training": """\
@article{hoffmann2022training,
  title   = {Training Compute-Optimal Large Language Models},
  author  = {Hoffmann, Jordan and Borgeaud, Sebastian and Mensch, Arthur and others},
  journal = {arXiv preprint arXiv:2203.15556},
  year    = {2022}
}
""",
    "besiroglu2024chinchilla": """\
@article{besiroglu2024chinchilla,
  title   = {Chinchilla Scaling: A replication attempt},
  author  = {Besiroglu, Tamay and Erdil, Ege and Barnett, Matthew and You, Josh},
  journal = {arXiv preprint arXiv:2404.10102},
  year    = {2024}
}
""",
    "yang2022tensor": """\
@article{yang2022tensor,
  title   = {Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer},
  author  = {Yang, Greg and Hu, Edward J. and Babuschkin, Igor and Sidor, Szymon and others},
  journal = {arXiv preprint arXiv:2203.03466},
  year    = {2022}
}
""",
    "dey2025completep": """\
@article{dey2025completep,
  title   = {Don't be lazy: CompleteP enables compute-efficient deep transformers},
  author  = {Dey, Nolan and Zhang, Bin Claire and Noci, Lorenzo and Li, Mufan and others},
  journal = {arXiv preprint arXiv:2505.01618},
  year    = {2025}
}
""",
    "loshchilov2017decoupled": """\
@article{loshchilov2017decoupled,
  title   = {Decoupled Weight Decay Regularization},
  author  = {Loshchilov, Ilya and Hutter, Frank},
  journal = {arXiv preprint arXiv:1711.05101},
  year    = {2017}
}
""",
    "jordan2024muon": """\
@misc{jordan2024muon,
  title  = {Muon: An optimizer for hidden layers in neural networks},
  author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and others},
  url    = {https://kellerjordan.github.io/posts/muon/},
  year   = {2024}
}
""",
    "hu2024minicpm": """\
@article{hu2024minicpm,
  title   = {MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
             Strategies},
  author  = {Hu, Shengding and Tu, Yuge and Han, Xu and He, Chaoqun and others},
  journal = {arXiv preprint arXiv:2404.06395},
  year    = {2024}
}
""",
    "hagele2024scaling": """\
@article{hagele2024scaling,
  title   = {Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations},
  author  = {H{\\"a}gele, Alexander and Bakouch, Elie and Kosson, Atli and others},
  journal = {arXiv preprint arXiv:2405.18392},
  year    = {2024}
}
""",
    "jamieson2016non": """\
@inproceedings{jamieson2016non,
  title     = {Non-stochastic Best Arm Identification and Hyperparameter Optimization},
  author    = {Jamieson, Kevin and Talwalkar, Ameet},
  booktitle = {Artificial Intelligence and Statistics},
  year      = {2016}
}
""",
    "bergsma2025power": """\
@inproceedings{bergsma2025power,
  title     = {Power Lines: Scaling Laws for Weight Decay and Batch Size in {LLM} Pre-training},
  author    = {Bergsma, Shane and Dey, Nolan and Gosal, Gurpreet and Gray, Gavia and Soboleva, Daria
               and Hestness, Joel},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025}
}
""",
    "malladi2022sdes": """\
@inproceedings{malladi2022sdes,
  title     = {On the {SDEs} and Scaling Rules for Adaptive Gradient Algorithms},
  author    = {Malladi, Sadhika and Lyu, Kaifeng and Panigrahi, Abhishek and Arora, Sanjeev},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}
""",
}


def used(sweep: Json) -> str:
    """The entries for what a resolved sweep asks for."""
    base = part(sweep.get("base"))
    model, optimizer = part(base.get("model")), part(base.get("optimizer"))
    kind, name = model.get("parametrization"), optimizer.get("name")
    follows = bool(part(sweep.get("horizon")).get("tokens"))
    asked = {
        "kaplan2020scaling": True,
        "hoffmann2022training": True,
        "besiroglu2024chinchilla": True,
        "yang2022tensor": kind in ("mup", "completep"),
        "dey2025completep": kind == "completep",
        "loshchilov2017decoupled": name == "adamw",
        "jordan2024muon": name == "muon",
        "hu2024minicpm": optimizer.get("schedule") == "wsd",
        "hagele2024scaling": bool(sweep.get("branches")),
        "jamieson2016non": bool(sweep.get("halve")),
        "bergsma2025power": follows,
        "malladi2022sdes": follows,
    }
    return "\n".join(ENTRIES[key] for key, wanted in asked.items() if wanted)
