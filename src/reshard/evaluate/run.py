"""One run, from the folder to the report.

    folder -> weights -> tokenizer -> model -> answers or scores -> benchmark -> comparison
                 |           |          |              |                |            |
                 +-----------+----------+---- findings, failures -------+------------+--> report

A stage that fails is recorded; what depends on it is left out; the report is written in any case.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from reshard.evaluate import health
from reshard.evaluate.device import environment, place, set_seed
from reshard.evaluate.encoding import Encoder, Media, load_encoder, load_media
from reshard.evaluate.folder import Folder, read_folder
from reshard.evaluate.generation import end_tokens, generate, in_force, settings
from reshard.evaluate.judging import judge, record_first
from reshard.evaluate.loading import Loaded, load_model, load_tokenizer, quiet
from reshard.evaluate.options import Options
from reshard.evaluate.page import write_page
from reshard.evaluate.progress import Event, Listener, silent
from reshard.evaluate.repetition import check_answers, check_logits
from reshard.evaluate.report import Answer, Score, TryReport, plain
from reshard.evaluate.scan import read_weights
from reshard.evaluate.scoring import score
from reshard.evaluate.stage import Stage
from reshard.evaluate.streaming import Spoken
from reshard.evaluate.texts import DEFAULT_PROMPTS, shipped_prompts
from reshard.evaluate.timing import benchmark
from reshard.storage.local import Sources
from reshard.storage.paths import file_size
from reshard.transfer.passes import scan

# Threads that look at the weights.
_SCANNING = 2


def run(options: Options, listen: Listener = silent) -> TryReport:
    """Try a model, and write the report to `options.output_file` (and `options.html`).

    Never raises for what the model does; `report.exit_code` and `report.failures` tell. Raises
    `WriteError` if the report cannot be written. An interrupt leaves the report as well.
    """
    quiet()
    trial = _Trial(options, listen)
    began = time.perf_counter()
    try:
        trial.go()
        trial.report.close()
    except KeyboardInterrupt:
        trial.report.status = "interrupted"
        raise
    finally:
        trial.report.seconds = time.perf_counter() - began
        trial.report.write(options.output_file)
        if options.html is not None:
            write_page(trial.report, options.html)
    return trial.report


class _Trial:
    """The run's state: the report so far, and the model while it is loaded."""

    def __init__(self, options: Options, listen: Listener) -> None:
        self.options = options
        self.listen = listen
        self.report = TryReport(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model_path=str(options.model),
            options=plain(options),
            environment=environment(),
        )
        self.prompts = options.prompts or tuple(
            prompt.text for prompt in shipped_prompts()[:DEFAULT_PROMPTS]
        )
        self.loaded: Loaded | None = None

    def go(self) -> None:
        """Every stage in order; each needs those before it."""
        folder = self._folder()
        if folder is None or not self._weights(folder):
            return
        encoder = self._encoder(folder)
        self.report.findings += health.check_files(folder, encoder)
        self._load(folder, encoder)
        if encoder is None or self.loaded is None:
            return
        media = self._media(folder, encoder)
        if media is None:
            return
        self._ask(self.loaded, encoder, media)
        if self.options.benchmark:
            self._benchmark(self.loaded, encoder, media)
        if self.options.compare is not None:
            self._compare(self.options.compare, encoder, media)

    def _stage(self, name: str) -> Stage:
        self.listen(Event(name))
        return Stage(name, self.report.failures)

    def _steps(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.listen(Event(name, done, total))

    def _folder(self) -> Folder | None:
        with self._stage("read the folder"):
            return read_folder(self.options.model)
        return None

    def _weights(self, folder: Folder) -> bool:
        name = "look at the weights"
        with self._stage(name) as stage, Sources() as sources:
            entries = read_weights(folder.weights, sources).values()
            found = scan(entries, sources, threads=_SCANNING, heard=self._steps(name))
            self.report.findings += health.check_weights(found)
        return stage.failure is None

    def _encoder(self, folder: Folder) -> Encoder | None:
        remote_code = self.options.trust_remote_code
        with self._stage("load the tokenizer"):
            tokenizer = load_tokenizer(folder.path, remote_code=remote_code)
            return load_encoder(folder, tokenizer, chat=self.options.chat, remote_code=remote_code)
        return None

    def _load(self, folder: Folder, encoder: Encoder | None) -> None:
        with self._stage("load the model"):
            placement = place(self.options.device, sum(file_size(p) for p in folder.weights))
            if placement.note is not None:
                self.report.notes.append(placement.note)
            loaded = load_model(
                folder,
                placement,
                dtype=self.options.dtype,
                remote_code=self.options.trust_remote_code,
            )
            chat = encoder is not None and encoder.chat and encoder.has_template
            self.report.model = loaded.facts(chat)
            self.report.findings += health.check_gaps(loaded.gaps)
            self.report.findings += health.check_tied(loaded)
            if encoder is not None:
                self.report.findings += health.check_vocabulary(loaded, encoder)
            self.loaded = loaded

    def _media(self, folder: Folder, encoder: Encoder) -> Media | None:
        with self._stage("read images and audio"):
            return load_media(self.options.images, self.options.audio, folder, encoder)
        return None

    def _arguments(self, loaded: Loaded, encoder: Encoder) -> dict[str, Any]:
        """What `generate` is called with; of a model that only scores, nothing."""
        if not loaded.folder.kind.generates:
            return {"max_new_tokens": self.options.max_new_tokens}
        options = self.options
        return settings(options.sampling, options.max_new_tokens, encoder.tokenizer, loaded.core)

    def _ask(self, loaded: Loaded, encoder: Encoder, media: Media) -> None:
        """Put every prompt to the model."""
        if not loaded.folder.kind.generates:
            for number, prompt in enumerate(self.prompts, start=1):
                scored = self._score(loaded, encoder, media, prompt, number)
                self.report.scores.append(scored)
                self.listen(Event("score", number, len(self.prompts), scored))
            return
        with self._stage("prepare the answers") as stage:
            arguments = self._arguments(loaded, encoder)
            self.report.generation = in_force(arguments, loaded.core)
        if stage.failure is not None:
            return
        bad_steps = 0
        for number, prompt in enumerate(self.prompts, start=1):
            answer, bad = self._answer(loaded, encoder, media, prompt, number, arguments)
            bad_steps += bad
            self.report.answers.append(answer)
            self.listen(Event("answer", number, len(self.prompts), answer))
        self.report.findings += check_answers(self.report.answers, len(encoder.tokenizer))
        self.report.findings += check_logits(bad_steps)

    def _answer(
        self,
        loaded: Loaded,
        encoder: Encoder,
        media: Media,
        prompt: str,
        number: int,
        arguments: dict[str, Any],
    ) -> tuple[Answer, int]:
        """The answer, and the number of its steps whose logits were not finite."""
        name = f"answer prompt {number} of {len(self.prompts)}"
        rendered: str | None = None
        with self._stage(name) as stage:
            rendered = encoder.render(prompt, media)
            inputs = encoder.encode([rendered], media)
            set_seed(self.options.seed)
            spoken, most = Spoken(encoder.tokenizer), self.options.max_new_tokens

            def heard(count: int, new: list[int]) -> None:
                self.listen(Event(name, count, most, prompt=prompt, text=spoken.add(new)))

            output = generate(loaded, inputs, arguments, on_token=heard)
            new = output.rows[0]
            ended = bool(new) and new[-1] in end_tokens(arguments, loaded.core)
            answer = Answer(
                prompt=prompt,
                rendered=rendered,
                text=encoder.tokenizer.decode(new, skip_special_tokens=True),
                prompt_tokens=int(inputs["input_ids"].shape[1]),
                token_ids=tuple(new),
                ended="stop" if ended else "length",
                seconds=output.seconds,
            )
            return answer, output.bad_steps
        error = stage.failure.message if stage.failure else None
        return Answer(prompt, rendered, None, 0, (), None, 0.0, error), 0

    def _score(
        self, loaded: Loaded, encoder: Encoder, media: Media, prompt: str, number: int
    ) -> Score:
        rendered: str | None = None
        with self._stage(f"score prompt {number} of {len(self.prompts)}") as stage:
            rendered = encoder.render(prompt, media)
            inputs = encoder.encode([rendered], media)
            began = time.perf_counter()
            scores = score(loaded, inputs)[0]
            seconds = time.perf_counter() - began
            return Score(prompt, rendered, scores, int(inputs["input_ids"].shape[1]), seconds)
        error = stage.failure.message if stage.failure else None
        return Score(prompt, rendered, {}, 0, 0.0, error)

    def _benchmark(self, loaded: Loaded, encoder: Encoder, media: Media) -> None:
        name = "benchmark"
        with self._stage(name):
            set_seed(self.options.seed)
            self.report.benchmark = benchmark(
                loaded,
                encoder,
                shipped_prompts(),
                media,
                self._arguments(loaded, encoder),
                samples=self.options.benchmark_samples,
                batch_sizes=self.options.batch_sizes,
                on_sample=self._steps(name),
            )

    def _compare(self, other: Path, encoder: Encoder, media: Media) -> None:
        """Compare with `other`. The first model is released before: both may not fit."""
        name = "compare"
        with self._stage(name), tempfile.TemporaryDirectory() as spill:
            if self.loaded is None:
                return
            answers = dict(enumerate(self.report.answers))
            asked = [(prompt, answers.get(index)) for index, prompt in enumerate(self.prompts)]
            heard = self._steps(name)
            first = record_first(
                self.loaded, encoder, media, asked, self.options.text, Path(spill), heard
            )
            self.loaded = None
            _release()
            self.report.comparison = judge(first, self.options, other, heard)


def _release() -> None:
    """Free the memory of a model that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
