"""TextWorldExpress: eight small, fast text games (coin, cookingworld, mapreader, twc, ...).

It needs ``pip install 'hiper-lab[express]'`` and a Java runtime on the PATH: every environment
starts a Java process of about 100 MB.

Left out on purpose: the gold paths, and the engine's own limit of turns.

Source: Jansen & Côté 2023, TextWorldExpress (arXiv:2208.01174; Apache-2.0).
"""


class ExpressEnv:
    """One of the games; every seed is another episode of it.

    Args:
        game: A name of the engine's, for instance "coin".
        split: "train", "dev" or "test", between which the seeds are divided.
        parameters: The engine's settings, for instance "numLocations=3,numDistractorItems=0".
        max_turns: Truncate after this many turns.

    Raises:
        ImportError: If the extra is not installed.
        ValueError: If there is no such game or split.
    """

    def __init__(
        self, game: str = "coin", split: str = "train", parameters: str = "", max_turns: int = 50
    ):
        from textworld_express import TextWorldExpressEnv

        self.game, self.max_turns = game, max_turns
        self._env = TextWorldExpressEnv(envStepLimit=2**30)
        if game not in self._env.getGameNames():
            raise ValueError(f"game: saw {game!r}, expected one of {self._env.getGameNames()}")
        self._env.load(gameName=game, gameParams=parameters)
        seeds = {
            "train": self._env.getValidSeedsTrain,
            "dev": self._env.getValidSeedsDev,
            "test": self._env.getValidSeedsTest,
        }
        if split not in seeds:
            raise ValueError(f"split: saw {split!r}, expected one of {sorted(seeds)}")
        self._split, self._parameters, self._seeds = split, parameters, list(seeds[split]())

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        self._episode, self._texts = self._seeds[(seed or 0) % len(self._seeds)], ()
        observation, state = self._env.reset(
            seed=self._episode,
            gameFold=self._split,
            gameName=self.game,
            gameParams=self._parameters,
            generateGoldPath=False,
        )
        return observation, self._info(state)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        observation, reward, _, state = self._env.step(text.encode(errors="replace").decode())
        self._texts += (text,)
        over = bool(state["tasksuccess"] or state["taskfailure"])
        return (
            observation,
            float(reward),
            over,
            len(self._texts) >= self.max_turns and not over,
            self._info(state),
        )

    def snapshot(self) -> tuple[int, tuple[str, ...]]:
        return self._episode, self._texts

    def restore(self, snapshot: tuple[int, tuple[str, ...]]) -> dict:
        """The engine can't go back: the texts are played again."""
        episode, texts = snapshot
        info = self.reset(self._seeds.index(episode))[1]
        for text in texts:
            info = self.step(text)[-1]
        return info

    def _info(self, state: dict) -> dict:
        return {
            "admissible": list(dict.fromkeys(state["validActions"])),
            "task_type": self.game,
            "won": bool(state["tasksuccess"]),
            "task": state["taskDescription"],
        }
