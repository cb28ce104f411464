from agent.who import NAME as NAME
