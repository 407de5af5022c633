/** Questions to the server. Nothing here knows what the answers are for. */

import { reword } from "./dom.js";

const token = new URLSearchParams(location.search).get("token") || "";
const SLOW = 500; // milliseconds until a panel says that it computes
const WAIT = 0.5; // seconds between two automatic rounds, at least
const SHARE = 20; // … and at least this many times as long as the last one took: at most 5 % of the time goes to the page

/** An error whose message is one line for the reader. */
export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** GET `path`, or POST `body` as JSON. Returns the JSON (or the text) of the answer, or throws a Failure. */
export async function ask(path, body) {
  const options = { headers: { "X-Quill-Token": token }, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Failure("The server does not answer. Is play.py still running?", 0);
  }
  const isJson = (answer.headers.get("Content-Type") || "").includes("json");
  const content = await (isJson ? answer.json() : answer.text()).catch(() => null);
  if (!answer.ok)
    throw new Failure(content?.error ? reword(content.error) : `The server answers ${answer.status}.`, answer.status);
  return content;
}

/** A path with parameters; those that are null are left out. */
export function query(path, parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined);
  return `${path}?${new URLSearchParams(given)}`;
}

/** The address of a run's event stream. EventSource cannot send headers, so the token is a parameter. */
export const streamAddress = (name) => query("/api/events", { name, token });

/**
 * Make `work` run one at a time: calls during a run become one more run at its end, with the newest arguments.
 * The panel `id` says that it computes, if that takes longer than a moment.
 */
export function oneAtATime(work, id = "main") {
  let running = null;
  let next = null;
  return function call(...args) {
    if (running) {
      next = args;
      return running;
    }
    const panel = document.getElementById(id);
    const slow = setTimeout(() => panel.classList.add("busy"), SLOW);
    running = Promise.resolve(work(...args)).finally(() => {
      clearTimeout(slow);
      panel.classList.remove("busy");
      running = null;
      const again = next;
      next = null;
      return again && call(...again);
    });
    return running;
  };
}

/** Run `work` by itself, when asked for, but no faster than training can bear. Returns the function that asks. */
export function gently(work) {
  let timer = null;
  let free = 0; // the time before which nothing is asked
  const go = async () => {
    const began = performance.now();
    await work();
    const now = performance.now();
    free = now + Math.max(WAIT * 1000, SHARE * (now - began));
    timer = null;
  };
  return () => {
    timer ??= setTimeout(go, Math.max(0, free - performance.now()));
  };
}
