/** The event stream of the run that is shown: it tells what changed, and when the server is gone or back. */

import { ask, query, streamAddress } from "./api.js";
import { announce } from "./dom.js";
import { change, view } from "./store.js";

let source = null;
let timer = null;

/** Say in the status line that the server is away; `lost` is null when all is well. */
function say(lost) {
  if (view.lost && !lost) announce("The server is back.");
  change({ lost });
}

/** Listen to the run `name`, and call `changed` with each run object. Replaces the stream before. */
export function listen(name, changed) {
  source?.close();
  clearTimeout(timer);
  const mine = new EventSource(streamAddress(name));
  source = mine;
  mine.onmessage = (event) => {
    say(null);
    changed(JSON.parse(event.data));
  };
  mine.onerror = () => {
    if (source === mine) retry(mine, name, changed);
  };
}

/** Ask why the stream ended, once a second, until the server answers. */
async function retry(mine, name, changed) {
  mine.close();
  try {
    const run = await ask(query("/api/run", { name }));
    if (source !== mine) return; // another run was chosen meanwhile
    say(null);
    changed(run);
    timer = setTimeout(() => listen(name, changed), 1000);
  } catch (error) {
    if (source !== mine) return;
    if (error.status === 404) {
      say(`${name} is gone: its folder was deleted or renamed. Choose another model.`);
      return;
    }
    if (error.status === 403) {
      say("The server was started again and has a new address. Open the line that it printed: all runs are there.");
    } else {
      say("The server does not answer. Runs go on without it. This page tries again every second …");
    }
    timer = setTimeout(() => retry(mine, name, changed), 1000);
  }
}
